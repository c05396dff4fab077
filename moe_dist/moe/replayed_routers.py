"""Feeds recorded choices back into the routers of a model. A token goes to its recorded experts even if the router would
now choose different ones. The routing weights and their gradients are computed anew.

    with Replay(model, ids_TLK, group_T):
        step(batches, ...)

A forward pre-hook of each router writes the choices into the `RoutingCache`, as if a first forward had chosen these
columns. Everything after the choice of experts runs as in training. The hooks are removed when the context ends.

Shape letters: T tokens of this rank, L MoE layers, K choices of a token, C choice columns, G expert groups.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from moe_dist.comm.collectives import from_host
from moe_dist.errors import ConfigError, DataError
from moe_dist.moe.dispatch.ledger import in_backward
from moe_dist.moe.experts.lora import LoRALayer
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.selection import ChoosingRouter
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.types import ABSENT, group_columns

ONE_FEWER = (
    "vLLM and SGLang return no row for the last token of a sequence, which passed no layer: leave out this token, whose "
    "next token is no label, or give it a row of -1 and group -1, as for padding"
)


class Replay:
    """A context in which the model's routers choose the columns in `ids_TLK`. Each layer reads the rows of `ids_TLK` in
    order: a call with T tokens reads the next T rows. The micro-batches must thus come in the order of `ids_TLK`.
    Recomputation in backward reads the rows a second time, in the same order. When the context ends, each layer must have
    read all rows.

    Attributes:
        ids_TLK: The choices, int16 in host memory (2 T L K bytes). A replay needs no other memory.

    Args:
        model: A model with `MoELayer`s or `LoRALayer`s whose routers inherit `forward` and `_choose` from `TopKRouter`. For
            example a model of moe_dist, also with FSDP2 or DDP, or Megatron's GPTModel with `ExpertLayer`s.
        ids_TLK: Integers, the chosen columns (see `moe_dist.moe.routing.types`) of this rank's tokens, including padding.
            As in a trace, -1 means no choice, and -2 - c means a pair of column c that a capacity dropped. The replay drops
            the same pairs. True experts are the first columns, so other systems' expert ids are valid, too.
        group_T: Expert group of each token, -1 for padding; None if all tokens are of group 0.
        source: Name of the record in error messages, for example its file.

    Raises:
        ConfigError: the model has a router that cannot replay.
        DataError: the choices are invalid for the model or the tokens.
    """

    def __init__(
        self, model: nn.Module, ids_TLK: np.ndarray, group_T: np.ndarray | None = None, *, source: str = "replay"
    ) -> None:
        self._routers, self._source = replayable_routers(model), source
        group_T = np.zeros(len(ids_TLK), np.int64) if group_T is None else group_T
        self.ids_TLK = _fitting(np.asarray(ids_TLK), group_T, self._routers, source)

    def __enter__(self) -> Self:
        # number of tokens that have passed each layer, in forward (key False) and in recomputation (key True)
        self._passed = {repeated: [0] * len(self._routers) for repeated in (False, True)}
        hooks = [partial(self._give, layer) for layer in range(len(self._routers))]
        pairs = zip(self._routers, hooks, strict=True)
        self._handles = [router.register_forward_pre_hook(hook) for router, hook in pairs]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        if kind is None and any(passed != len(self.ids_TLK) for passed in self._passed[False]):
            raise DataError(
                f"{self._source}: {len(self.ids_TLK)} tokens, but {self._passed[False]} tokens passed the MoE layers; a "
                "replay needs the batches of the record, so give those"
            )

    def _give(self, layer: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        h_TD, _, cache = inputs
        if cache.choice_TK is not None:
            return  # a recomputed block reuses the cache that its forward filled
        passed = self._passed[in_backward()]
        first = passed[layer]
        passed[layer] = end = first + h_TD.shape[0]
        if end > len(self.ids_TLK):
            raise DataError(
                f"{self._source}: {len(self.ids_TLK)} tokens, but {end} tokens reach MoE layer {layer} (counted from 0); a "
                f"replay needs the batches of the record, so give those; {ONE_FEWER}"
            )
        column_TK = from_host(self.ids_TLK[first:end, layer], torch.int16, h_TD.device).to(torch.int64)
        cache.dropped_TK = column_TK < ABSENT
        # -1 (padding, or a choice beyond the group's k) becomes column 0, because routers ignore these choices.
        cache.choice_TK = torch.where(cache.dropped_TK, -2 - column_TK, column_TK).clamp_min(0)


def replayable_routers(model: nn.Module) -> list[TopKRouter]:
    """Returns the routers of the model's MoE layers, in order. Raises ConfigError if the model has no MoE layer, or if one
    of its routers does not choose as `TopKRouter` does."""
    routers = [module.router for module in model.modules() if isinstance(module, MoELayer | LoRALayer)]
    others = [module for module in model.modules() if isinstance(module, ChoosingRouter)]  # also mixture of depths
    others += [router for router in routers if not _keeps_choices(router)]
    if others or not routers:
        found = f"a router of class {type(others[0]).__name__}" if others else "no MoE layer"
        raise ConfigError(
            f"replay: the model has {found}, but routing can be replayed only where each token chooses a fixed number of "
            "experts (router.kind top_k or group_limited, without mixture of depths); give such a model"
        )
    return routers  # pyright: ignore[reportReturnType]


def _keeps_choices(router: Any) -> bool:
    kept = isinstance(router, TopKRouter) and type(router).forward is TopKRouter.forward
    return kept and type(router)._choose is TopKRouter._choose


def _fitting(ids_TLK: np.ndarray, group_T: np.ndarray, routers: Sequence[TopKRouter], source: str) -> np.ndarray:
    """Returns the ids as int16, if the ids are valid for the model and the tokens."""
    wanted = (len(group_T), len(routers), routers[0].num_choices)
    if ids_TLK.shape != wanted or ids_TLK.dtype.kind not in "iu":
        raise DataError(
            f"{source}: ids are {ids_TLK.dtype} {list(ids_TLK.shape)}, but the batch and the model need whole numbers "
            f"[tokens, MoE layers, choices] = {list(wanted)}; replay the record of this batch and this model"
            + (f"; {ONE_FEWER}" if ids_TLK.shape[1:] == wanted[1:] and len(ids_TLK) < len(group_T) else "")
        )
    most = len(routers[0].groups) - 1
    if len(group_T) and not -1 <= group_T.min() <= group_T.max() <= most:
        raise DataError(
            f"{source}: group_T is from {group_T.min()} to {group_T.max()}, but the model's expert groups are 0 to "
            f"{most}, and padding is -1; give the group of each token's modality"
        )
    for layer, router in enumerate(routers):
        for wrong_TK, rule in _broken_rules(ids_TLK[:, layer].astype(np.int64), group_T, router):
            if wrong_TK.any():
                token = int(wrong_TK.any(1).argmax())
                raise DataError(
                    f"{source}: ids {ids_TLK[token, layer].tolist()} of token {token} in MoE layer {layer} (from 0), "
                    f"but {rule}; replay the record of this batch and this model"
                )
    return ids_TLK.astype(np.int16, copy=False)


def _broken_rules(ids_TK: np.ndarray, group_T: np.ndarray, router: TopKRouter) -> list[tuple[np.ndarray, str]]:
    """Returns pairs of a bool [T, K] and a rule. The bool is true where a choice breaks the rule."""
    group_C = np.array(group_columns(router.groups))
    k_G = np.array([group.top_k for group in router.groups] + [0])  # the last number is for padding, group -1
    chosen_TK = np.arange(ids_TK.shape[1]) < k_G[group_T][:, None]
    dropped_TK = ids_TK < ABSENT
    column_TK = np.where(dropped_TK, -2 - ids_TK, ids_TK)
    inside_TK = (column_TK >= 0) & (column_TK < len(group_C))
    elsewhere_TK = group_C[np.where(inside_TK, column_TK, 0)] != group_T[:, None]
    sorted_TK = np.sort(np.where(chosen_TK, column_TK, -2 - np.arange(ids_TK.shape[1])), axis=1)  # all others differ
    drops = router.capacity is not None and router.training
    return [
        (chosen_TK & ~inside_TK, f"a choice is a column from 0 to {len(group_C) - 1} of the model"),
        (~chosen_TK & (ids_TK != ABSENT), f"a token has {k_G[:-1].tolist()} choices by group, padding none, and then -1"),
        (chosen_TK & elsewhere_TK, "a token takes only columns of its own expert group"),
        (sorted_TK[:, 1:] == sorted_TK[:, :-1], "a token takes no column twice"),
        (dropped_TK & (column_TK >= router.num_experts), "only pairs of true experts are dropped"),
        (dropped_TK & (not drops), "only training with model.moe.capacity drops pairs (ids below -1)"),
    ]
