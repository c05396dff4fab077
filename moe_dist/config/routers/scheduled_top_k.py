from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.routers.base import ROUTER, RouterSection
from moe_dist.config.section import GroupName, NonNegative, Violation, WholeConfig

# Not strict: the router's kind is filled in before validation, when the value is a Python list and never a tuple.
LayerActiveExperts = Annotated[tuple[NonNegative, ...], Field(strict=False)]
KEY = f"{ROUTER}.active_experts"


class ScheduledTopKRouterSection(RouterSection):
    """Top-k with the number of experts fixed in each layer, or drawn at random: what null experts are compared with."""

    needs_global_batch_info: ClassVar[bool] = True  # draws are numbered by the tokens of the whole step
    only_true_experts: ClassVar[bool] = True

    kind: Literal["scheduled_top_k"] = "scheduled_top_k"
    active_experts: dict[GroupName, LayerActiveExperts] = Field(min_length=1)
    """By group, true experts a token in each MoE layer, at most the group's top_k: its floor for every token, the best
    ones, and one more for a random part of them. Whole numbers are a k by layer."""
    normalise: Literal["true_chosen", "none"] = "true_chosen"
    """As in router.kind=top_k: a softmax over the chosen experts, or over the group."""
    scale: PositiveFloat = Field(default=1.0, description="Factor on every routing weight.")

    def not_causal(self) -> str:
        return f"{self.name}: its choice hangs on the place in a batch; generate from a run of another router"

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        model = config.model
        layers, groups = len(model.moe_layers), model.moe.groups
        if set(self.active_experts) != set(groups):
            problem = (
                f"{KEY} names {', '.join(self.active_experts)}; model.moe.groups are {', '.join(groups)}: name each of them"
            )
            yield Violation((KEY, "model.moe.groups"), problem)
        for name, loads in self.active_experts.items():
            if len(loads) != layers:
                problem = f"{KEY}.{name} has {len(loads)} numbers for {layers} MoE layers: give one for each"
                yield Violation((f"{KEY}.{name}", "model.num_layers"), problem)
            if name in groups and max(loads, default=0.0) > groups[name].top_k:
                problem = (
                    f"{KEY}.{name} has {max(loads):g}, above model.moe.groups.{name}.top_k={groups[name].top_k}: lower it, "
                    "or raise top_k"
                )
                yield Violation((f"{KEY}.{name}", f"model.moe.groups.{name}.top_k"), problem)
            # A draw is for a step and a token, but a mixture-of-depths layer does not know which tokens its slots hold.
            drawn = [each for each, load in zip(model.moe_layers, loads, strict=False) if load % 1.0]
            if deep := sorted(set(drawn) & set(model.depth_layers)):
                problem = (
                    f"{KEY}.{name}={list(loads)} with model.mixture_of_depths: draws cannot be told by token in the layers "
                    f"{deep}, which compute some of them; give whole numbers there, or set model.mixture_of_depths to null"
                )
                yield Violation((f"{KEY}.{name}", "model.mixture_of_depths"), problem)
