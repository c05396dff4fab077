"""Compares the outcomes of a layout's ranks with one rank's."""

import numpy as np

from tests.support.agreement import Arrays, merged
from tests.support.layouts import Outcome


def merged_outcomes(outcomes: list[Outcome], field: str) -> Arrays:
    """Returns all ranks' tensors under logical names. Copies must be equal to the last bit."""
    return merged([getattr(each, field) for each in outcomes])


def assert_same_tensors(outcomes: list[Outcome], one_rank: Outcome) -> None:
    """Compares gradients and parameters in float64."""
    for field in ("gradients", "parameters"):
        got, expected = merged_outcomes(outcomes, field), getattr(one_rank, field)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-9, err_msg=f"{field}: {name}")
