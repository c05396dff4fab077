from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moe_dist.config.experts.base import ExpertsSection
from moe_dist.config.lora_schema import target_violations
from moe_dist.config.section import Decay, Violation, WholeConfig

EXPERTS = "model.moe.experts.kind"
GUIDE = "docs/lora-experts.md"


class LoRAExpertsSection(ExpertsSection):
    """The true experts are LoRA adapters over one frozen FFN a layer, which every token passes (LLaVA-MoLE)."""

    replicated: ClassVar[bool] = True
    over_frozen_ffn: ClassVar[bool] = True

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = Field(description="Rank of each expert's adapters (r).")
    alpha: PositiveFloat = Field(description="An adapter's output is scaled by alpha / rank.")
    dropout: Decay = Field(default=0.0, description="Share of an adapter's inputs that is dropped while training.")
    targets: tuple[Literal["gate", "up", "down"], ...] = ("gate", "up", "down")
    """Projections of the FFN that have adapters; all share the token's route."""
    weight: Literal["probability", "straight_through", "published"] = "probability"
    """Weight of a chosen expert: its probability p among all columns; p / p, whose value is 1 and whose gradient is p's; or
    1 as published, where the task teaches the router nothing."""

    @property
    def input_dropout(self) -> float:
        return self.dropout

    def violations(self) -> Iterator[Violation]:
        return target_violations(self.targets)

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        if config.model.moe.router.softmax_top_k:  # else lora_rules reports it, for both kinds of adapters
            for rule in (_routing, _groups, _sharding):
                yield from rule(config)


def _routing(config: WholeConfig) -> Iterator[Violation]:
    moe, key = config.model.moe, "model.moe.router"
    router = moe.router
    if router.normalise != "none":
        yield Violation(
            (f"{key}.normalise", EXPERTS),
            f"{key}.normalise={router.normalise}: how LoRA experts are weighted is said by model.moe.experts.weight, over "
            f"the softmax of all columns; set {key}.normalise=none",
        )
    if router.scale != 1.0:
        problem = f"{key}.scale={router.scale:g}: the factor of LoRA experts is model.moe.experts.alpha; set {key}.scale=1"
        yield Violation((f"{key}.scale", EXPERTS), problem)
    if moe.capacity is not None:
        problem = (
            "model.moe.capacity: LoRA experts are on every rank, where no load is too uneven, so that dropping pairs gains "
            "nothing; set it to null"
        )
        yield Violation(("model.moe.capacity", EXPERTS), problem)


def _groups(config: WholeConfig) -> Iterator[Violation]:
    moe = config.model.moe
    widths = {name: group.ffn_dim for name, group in moe.groups.items()}
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{name}: {width}" for name, width in widths.items())
        problem = f"model.moe.groups: ffn_dim is {said}; all groups adapt the same FFN: give each the width of the base's"
        yield Violation(("model.moe.groups", EXPERTS), problem)
    for name, group in moe.groups.items():
        if group.num_identity or group.num_constant:
            problem = (
                f"model.moe.groups.{name}: num_identity={group.num_identity}, num_constant={group.num_constant}: beside "
                "LoRA experts the choice that costs nothing is a null expert, the frozen FFN alone; set both to 0"
            )
            yield Violation((f"model.moe.groups.{name}", EXPERTS), problem)
    if moe.shared_ffn_dim:
        problem = (
            f"model.moe.shared_ffn_dim={moe.shared_ffn_dim}: the frozen FFN is what all tokens share, and the base has no "
            "other; set it to 0"
        )
        yield Violation(("model.moe.shared_ffn_dim", EXPERTS), problem)


def _sharding(config: WholeConfig) -> Iterator[Violation]:
    """LoRA experts are replicated: options that place or send experts do not apply."""
    why = (
        "LoRA experts are on every rank: sending a token to one would move rows of model.hidden_dim for products of rank r "
        f"({GUIDE})"
    )
    if config.placement.policy != "interleaved":
        problem = f"placement.policy={config.placement.policy}: {why}; leave placement out"
        yield Violation(("placement", EXPERTS), problem)
    parallel = config.parallel
    if parallel.dispatch.kind != "all_to_all" or parallel.dispatch.overlap or parallel.dispatch.chunks > 1:
        problem = f"parallel.dispatch: {why}; leave it out"
        yield Violation(("parallel.dispatch", EXPERTS), problem)
    unused: dict[str, Any] = {
        "expert_pair_budget": None, "max_receive_rows": None, "check_exchanges": False, "expert_gemm": "loop",
    }  # fmt: skip
    for name, default in unused.items():
        value = getattr(parallel, name)
        if value not in (default, "auto"):
            problem = f"parallel.{name}={value}: {why}; leave it out"
            yield Violation((f"parallel.{name}", EXPERTS), problem)
