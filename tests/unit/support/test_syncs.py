"""The counter of host syncs sees every read of a tensor, and nothing else."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.syncs import host_syncs

X = torch.arange(6)


@pytest.mark.parametrize(("read", "name"), [
    (lambda: X.tolist(), "tolist"),
    (lambda: X[0].item(), "item"),
    (lambda: X.cpu(), "cpu"),
    (lambda: X.numpy(), "numpy"),
    (lambda: np.asarray(X), "__array__"),
    (lambda: bool(X[0] > 0), "__bool__"),
    (lambda: int(X[1]), "__int__"),
    (lambda: list(range(X[2])), "__index__"),  # pyright: ignore[reportArgumentType]
    (lambda: X.nonzero(), "nonzero"),
    (lambda: X[X > 2], "index"),
    (lambda: X.unique(), "_unique2"),
    (lambda: X.repeat_interleave(X), "repeat_interleave"),
], ids=lambda each: each if isinstance(each, str) else "")  # fmt: skip
def test_a_read_is_seen_once(read: Callable[[], Any], name: str) -> None:
    with host_syncs() as seen:
        read()
    assert seen == [name]


def test_computation_is_no_read() -> None:
    with host_syncs() as seen:
        order = torch.argsort(X, stable=True)
        torch.where(X > 2, X, 0)[order].cumsum(0).clone().index_add_(0, X, X)
        X.repeat_interleave(2)
        torch.cat([X, X]).split([3, 9])
    assert seen == []
