"""Defines variants of Megatron-Core's dispatch as contenders of the dispatch benchmark.

default     expects K experts for each token
capacity    counts the rows to send; the capacity factor is so large that nothing is dropped
remapped    null choices go to true experts, with weight 0
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_dist.moe.routing.types import ABSENT
from research.bench.contenders import Case, Run
from research.gpu_bench.megatron_core import (
    Variant,
    column_of_expert,
    configuration,
    dispatcher_of,
    routing_tables,
    run_experts,
)

VARIANTS: Mapping[str, Variant] = {
    "megatron": Variant(),
    "megatron, capacity": Variant(capacity=True),
    "megatron, remapped": Variant(remapped=True),
}


def variants(*, nulls: bool) -> Mapping[str, Variant]:
    """Returns the variants for a routing with or without null choices. Without null choices, nothing can be remapped."""
    return {name: variant for name, variant in VARIANTS.items() if nulls or not variant.remapped}


def megatron_dispatch(case: Case, variant: Variant) -> Run:
    """Makes a contender with Megatron's dispatch, which sorts rows by expert, and with Megatron's combine. A remapped null
    choice goes to the expert that was drawn before the choice became null."""
    point = case.point
    config = configuration(
        hidden=point.hidden,
        experts=point.experts,
        top_k=point.top_k,
        ffn=point.hidden,
        ep=case.mesh.ep_size,
        capacity=variant.capacity,
    )
    dispatcher = dispatcher_of(config, case.mesh.ep_rank)
    weight_TK = torch.where(case.taken_TK == ABSENT, 0.0, case.weight_TK)
    chosen_TK = case.drawn_TK if variant.remapped else case.taken_TK
    probs_TE, map_TE = routing_tables(chosen_TK, weight_TK, column_of_expert(case.placement))

    def identity(rows: Tensor, _: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        return rows.mul_(probs[:, None]), None  # Megatron's experts multiply their output rows by weights

    pairs = int(map_TE.sum())
    return lambda: run_experts(dispatcher, identity, case.h_TD, probs_TE, map_TE, pairs)
