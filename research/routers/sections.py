"""Sections of the control routers: top-k with a random draw that decides whether a token takes one more expert."""

from collections.abc import Iterator
from typing import ClassVar, Literal
from zipfile import BadZipFile

import numpy as np
from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import GroupName, NonNegative, PathText, Violation, WholeConfig
from moe_dist.config.routers.base import ROUTER, RouterSection

ACTIVE, TABLE = f"{ROUTER}.active_experts", f"{ROUTER}.table"


class DrawnRouterSection(RouterSection):
    """The base of top-k routers with a random draw that decides whether a token takes one more expert."""

    needs_global_batch_info: ClassVar[bool] = True  # the draw of a token depends on the token's number in the step
    only_true_experts: ClassVar[bool] = True

    normalise: Literal["true_chosen", "none"] = "true_chosen"
    """Routing weights are a softmax over the chosen experts (true_chosen) or over all experts of the group (none)."""
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")

    def not_causal(self) -> str:
        return f"{self.name}: its choice depends on the position in a batch; generate from a run with another router"


class ScheduledTopKRouterSection(DrawnRouterSection):
    """Top-k with a given mean k for each layer, which does not depend on the token: a baseline for null experts."""

    builds = "research.routers.scheduled_top_k:ScheduledTopKRouter"

    kind: Literal["scheduled_top_k"] = "scheduled_top_k"
    active_experts: dict[GroupName, tuple[NonNegative, ...]] = Field(min_length=1)
    """Mean number of true experts per token, by group and MoE layer; at most the group's top_k. With 1.5 every token takes
    its best expert, and a random half of the tokens also takes the second best expert."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        model = config.model
        layers, groups = len(model.moe_layers), model.moe.groups
        if set(self.active_experts) != set(groups):
            problem = (
                f"{ACTIVE} names {', '.join(self.active_experts)}; model.moe.groups are {', '.join(groups)}: "
                "name each group"
            )
            yield Violation((ACTIVE, "model.moe.groups"), problem)
        for name, loads in self.active_experts.items():
            key = f"{ACTIVE}.{name}"
            if len(loads) != layers:
                problem = f"{key} has {len(loads)} numbers for {layers} MoE layers: give one number for each layer"
                yield Violation((key, "model.num_layers"), problem)
            if name in groups and max(loads, default=0.0) > groups[name].top_k:
                top_k = f"model.moe.groups.{name}.top_k"
                problem = f"{key} has {max(loads):g}, above {top_k}={groups[name].top_k}: lower it, or raise top_k"
                yield Violation((key, top_k), problem)
            # The random draw needs each token's number in the step, which a mixture-of-depths layer does not pass on.
            drawn = [each for each, load in zip(model.moe_layers, loads, strict=False) if load % 1.0]
            if deep := sorted(set(drawn) & set(model.depth_layers)):
                problem = (
                    f"{key}={list(loads)} with model.mixture_of_depths: a draw per token is impossible in the layers "
                    f"{deep}, which compute some of the tokens; give whole numbers there, or set model.mixture_of_depths "
                    "to null"
                )
                yield Violation((key, "model.mixture_of_depths"), problem)


class TopKByIdRouterSection(DrawnRouterSection):
    """Top-k with a given mean k for each layer and token id: a baseline for routers that read the context."""

    builds = "research.routers.top_k_by_id:TopKByIdRouter"

    kind: Literal["top_k_by_id"] = "top_k_by_id"
    table: PathText
    """A NumPy file of floats [MoE layers, model.vocab_size]: the mean number of true experts of each token id in each
    layer; at most the smallest top_k of the groups."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        model = config.model
        if model.mixture_of_depths is not None:
            problem = (
                f"model.mixture_of_depths: {self.name} needs each token's id, which mixture-of-depths layers do not pass "
                f"on; set model.mixture_of_depths to null, or {ROUTER}.kind=scheduled_top_k"
            )
            yield Violation(("model.mixture_of_depths", f"{ROUTER}.kind"), problem)
        if not config.engine.passes_token_ids:
            problem = (
                f"engine.kind={config.engine.kind}: it passes no token ids to layers, as {self.name} needs; set "
                f"engine.kind=moe_dist, or {ROUTER}.kind=scheduled_top_k"
            )
            yield Violation(("engine.kind", f"{ROUTER}.kind"), problem)

    def file_violations(self, config: WholeConfig) -> Iterator[Violation]:
        if problem := self._fault_of_table(config):
            yield Violation((TABLE,), f"{TABLE}={self.table}: {problem}")

    def _fault_of_table(self, config: WholeConfig) -> str:
        model = config.model
        try:
            table_LV = np.load(self.table, allow_pickle=False)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            return f"is no NumPy file ({error}); write one with numpy.save"
        if not isinstance(table_LV, np.ndarray):
            return "holds several arrays; write one with numpy.save"
        shape = (len(model.moe_layers), model.vocab_size)
        if table_LV.shape != shape or table_LV.dtype.kind != "f":
            return f"has {table_LV.dtype} {list(table_LV.shape)}; give floats {list(shape)}: MoE layers, token ids"
        top_k = min(group.top_k for group in model.moe.groups.values())
        if not ((table_LV >= 0.0) & (table_LV <= top_k)).all():  # nan compares false
            return f"has numbers outside 0 to {top_k}, the smallest top_k of model.moe.groups; change them, or raise top_k"
        return ""
