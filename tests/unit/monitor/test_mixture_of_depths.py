"""The scalars of layers that compute only a share of the tokens have values that were computed by hand."""

from dataclasses import replace

import numpy as np
import pytest

from moe_dist.monitor.metrics import evaluation_scalars
from moe_dist.monitor.statistics import EvaluationResult
from tests.unit.monitor.conftest import DEPTHS, MODALITIES, MakeRecord

HELD_OUT = replace(DEPTHS, taken_LG=np.array([[8, 0], [100, 60]]), agreed_L=None, weight_L=None)
RESULT = EvaluationResult(3, {"text": 3.0}, {"text": 4}, mixture_of_depths=HELD_OUT)


def test_scalars_by_hand(make_record: MakeRecord) -> None:
    scalars = make_record(1, mixture_of_depths=DEPTHS).scalars
    assert {tag: value for tag, value in scalars.items() if tag.startswith("mixture_of_depths/")} == pytest.approx(
        {
            "mixture_of_depths/computed/text": 46 / 200,
            "mixture_of_depths/computed/image": 34 / 120,
            "mixture_of_depths/agreement": 272 / 320,
            "mixture_of_depths/gate_weight": 52 / 80,
        }
    )
    assert evaluation_scalars(RESULT, MODALITIES, 2) == {
        "eval/text": 3.0,
        "mixture_of_depths/load_over_target": pytest.approx((8 / 160 + 1.0) / 2 / 0.25),
    }
