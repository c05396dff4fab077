"""Compares the tensors of two implementations. Differences are relative to the largest entry of a tensor."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]
BOUND = 1e-5
SMALLEST_GAP = 1e-5


def assert_agree(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    """Asserts that no entry differs by more than BOUND of its tensor's largest entry. The bias of keys is an exception: its
    differences are compared with the largest entry of the keys' weight. A softmax ignores a constant added to all keys, so
    the terms of this bias's gradient nearly cancel and leave only rounding."""
    assert ours.keys() == theirs.keys()
    worst = {name: float(np.abs(ours[name] - theirs[name]).max()) for name in theirs}
    scale = {name: re.sub(r"(\.k)\.bias$", r"\1.weight", name) for name in theirs}
    off = {name: (each, float(np.abs(theirs[scale[name]]).max())) for name, each in worst.items()}
    assert not {name: pair for name, pair in off.items() if pair[0] > BOUND * pair[1]}


def smallest_gap(scores_TC: Tensor, top_k: int) -> float:
    """Returns the smallest difference between a token's k-th best score and the next one. If it is large enough, no
    choice depends on rounding."""
    best = scores_TC.detach().sort(-1, descending=True).values
    return float((best[:, top_k - 1] - best[:, top_k]).min())


@torch.no_grad()
def gap_of_choices(router: Any, h_TD: Tensor, group_T: Tensor) -> float:
    """Returns the smallest difference between a token's k-th best logit and the next one in its group."""
    logits_TC = router._logits(h_TD)
    in_group = [logits_TC[group_T == index][:, router.group_of_column_C == index] for index in range(len(router.groups))]
    pairs = zip(in_group, router.groups, strict=True)
    return min((smallest_gap(each, group.top_k) for each, group in pairs if len(each)), default=float("inf"))


def arrays(named: Mapping[str, Tensor]) -> Arrays:
    """Copies tensors to numpy arrays."""
    return {name: tensor.detach().numpy().copy() for name, tensor in named.items()}


def merged(ranks: Sequence[Arrays]) -> Arrays:
    """Returns the tensors of all ranks by name. Copies of a tensor on several ranks must be bit-equal."""
    together: Arrays = {}
    for rank in ranks:
        for name, value in rank.items():
            np.testing.assert_array_equal(together.setdefault(name, value), value, err_msg=f"copies of {name} differ")
    return together


def reversed_scores(masked_TC: Tensor, _: Tensor) -> Tensor:
    """Returns selection scores by which the worst columns of each token's group win."""
    return masked_TC.detach().neg().masked_fill(masked_TC == float("-inf"), float("-inf"))
