"""Slow references of the routers that choose a number of columns for each token. They process one token at a time.

Each function takes one token's input x [D] and its group's tensors. It returns the weight of each column that the token
takes, without null columns. A group's columns are in the order true, null, identity, constant. This module shares no
code with the routers.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_dist.placement.placement import ExpertGroup

Tensors = Mapping[str, Tensor]  # has `rows` [C, D], `bias` [C], and the router's other tensors


def _null(group: ExpertGroup) -> range:
    return range(group.num_experts, group.num_experts + group.num_null)


def _mean_bias(tensors: Tensors, group: ExpertGroup) -> float:
    return sum(tensors["bias"].tolist()[: group.num_experts]) / group.num_experts


def _falling(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda column: (-values[column], column))


def _by_probability(prob_C: Tensor, tensors: Tensors, group: ExpertGroup) -> list[int]:
    shift, bias = _mean_bias(tensors, group), tensors["bias"].tolist()
    moved = [bias[c] - shift if c < group.num_experts else bias[c] for c in range(len(bias))]
    return _falling([p + b for p, b in zip(prob_C.tolist(), moved, strict=True)])[: group.top_k]


def _weights(columns: Sequence[int], logit_C: Tensor, group: ExpertGroup, normalise: bool) -> dict[int, Tensor]:
    kept = [column for column in columns if column not in _null(group)]
    prob_C = logit_C.softmax(-1)
    if not normalise:
        return {column: prob_C[column] for column in kept}
    total = sum((prob_C[column] for column in kept), start=torch.zeros_like(prob_C[0]))
    return {column: prob_C[column] / total for column in kept}


def top_p(x: Tensor, tensors: Tensors, group: ExpertGroup, *, p: float, normalise: bool) -> dict[int, Tensor]:
    logit_C = tensors["rows"] @ x
    prob_C, taken, total = logit_C.softmax(-1), [], 0.0
    for column in _by_probability(prob_C, tensors, group):
        if taken and total >= p + _mean_bias(tensors, group):
            break
        taken.append(column)
        total += prob_C[column].item()
    return _weights(taken, logit_C, group, normalise)


def relu(x: Tensor, tensors: Tensors, group: ExpertGroup) -> dict[int, Tensor]:
    value_C = tensors["rows"] @ x + tensors["bias"]
    best = _falling(value_C.tolist())[: group.top_k]
    return {c: value_C[c] for c in best if value_C[c].item() > 0 and c not in _null(group)}


def threshold(x: Tensor, tensors: Tensors, group: ExpertGroup, *, temperature: float) -> dict[int, Tensor]:
    margins = []
    for row, level in zip(tensors["rows"], tensors["level"], strict=True):
        cosine = (row @ x) / (row.square().sum().sqrt() * x.square().sum().sqrt())
        margins.append((cosine / temperature).sigmoid() - level.sigmoid())
    moved = [each.item() + bias.item() for each, bias in zip(margins, tensors["bias"], strict=True)]
    taken = [c for c in _falling(moved)[: group.top_k] if moved[c] > 0 and c not in _null(group)]
    # straight-through: the value is 1 / len(taken), and the gradient is the gradient of margin / len(taken)
    return {c: (1.0 + margins[c] - margins[c].detach()) / len(taken) for c in taken}


def predicted_k(x: Tensor, tensors: Tensors, group: ExpertGroup, *, normalise: bool) -> dict[int, Tensor]:
    number = group.top_k * (tensors["number"][0] @ x + _mean_bias(tensors, group)).sigmoid()
    logit_C = tensors["rows"] @ x
    taken = [c for j, c in enumerate(_by_probability(logit_C.softmax(-1), tensors, group)) if number.item() > j]
    weights = _weights(taken, logit_C, group, normalise)
    return {c: w * min(torch.ones_like(number), number - taken.index(c), key=Tensor.item) for c, w in weights.items()}


def expert_threshold(scores_TE: Tensor, mean_E: Sequence[float]) -> Tensor:
    """Returns weights [T, E]: the score where it exceeds the expert's running mean, else 0."""
    rows = [[s if s.item() > m else s * 0 for s, m in zip(row, mean_E, strict=True)] for row in scores_TE]
    return torch.stack([torch.stack(row) for row in rows])
