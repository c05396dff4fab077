from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from moe_dist.config.routers.base import ROUTER, RouterSection
from moe_dist.config.section import Decay, NonNegative, Violation, WholeConfig


class ExpertChoiceRouterSection(RouterSection):
    """Experts choose their tokens in training (MoMa); in evaluation each token is routed by itself."""

    experts_choose: ClassVar[bool] = True
    fixed_choices: ClassVar[bool] = False
    needs_global_batch_info: ClassVar[bool] = True
    only_true_experts: ClassVar[bool] = True  # no expert may take a token at all

    kind: Literal["expert_choice"] = "expert_choice"
    capacity: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of its group's tokens in the selection scope that each expert takes (c); null is top_k / num_experts of the
    group, so that a token is taken by top_k experts on average."""
    scope: Literal["rank", "ep_group", "world"] = "rank"
    """Tokens among which an expert chooses: those of one rank's micro-batch, of an EP group's, or of all ranks'. The latter
    two exchange the router's logits in each layer."""
    noise: NonNegative = 0.0
    """Scale of Gumbel-sigmoid noise on the logits in training, sigmoid(x + noise (G' - G'')); MoMa takes 1 after
    upcycling."""
    causal: Literal["threshold", "auxiliary"] | None = None
    """How evaluation routes a token without looking at later ones: by thresholds that follow the k-th largest score, or by
    auxiliary routers, trained in a second stage (train.only). Evaluation needs one of them."""
    threshold_decay: Decay = 0.99
    """Decay a step of the running means behind the thresholds; their memory is 1 / (1 - it)."""

    @property
    def has_auxiliary_routers(self) -> bool:
        return self.causal == "auxiliary"

    def expert_capacity(self, top_k: int, num_experts: int) -> float | None:
        return self.capacity or top_k / num_experts

    def counts_unknown(self) -> str:
        if self.scope == "rank":
            return ""
        return f"with {ROUTER}.scope={self.scope} it depends on the other ranks' scores, not with {ROUTER}.scope=rank"

    def not_causal(self) -> str:
        if self.causal is not None:
            return ""
        return (
            f"{ROUTER}.causal=null: the choice of experts looks at later tokens, and the run has no causal router; train "
            "one with causal=threshold or causal=auxiliary, and generate from that"
        )

    def keywords(self) -> dict[str, Any]:
        return self.model_dump(exclude={"kind", "scope"})  # the scope is passed as an object

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        if self.causal is not None:
            yield from super().violations_in(config)
        for rule in (_loss, _groups, _causal, _mixture_of_depths, _second_stage):
            yield from rule(self, config)


def _loss(section: ExpertChoiceRouterSection, config: WholeConfig) -> Iterator[Violation]:
    """Losses for token choice do not apply: expert choice is balanced by construction, and its scores are not a softmax."""
    schedule = config.loss.balance.schedule
    if any(coefficient for _, coefficient in schedule):
        problem = (
            f"loss.balance.schedule={[list(pair) for pair in schedule]}: {section.name} with token-choice losses; each "
            "expert takes its share of the tokens by itself: set loss.balance.schedule=[[0, 0]]"
        )
        yield Violation(("loss.balance.schedule", f"{ROUTER}.kind"), problem)
    if config.loss.z:
        problem = (
            f"loss.z={config.loss.z:g}: {section.name} with token-choice losses; the z-loss is of a softmax's logits, and "
            "the scores are sigmoids: set loss.z=0"
        )
        yield Violation(("loss.z", f"{ROUTER}.kind"), problem)


def _groups(section: ExpertChoiceRouterSection, config: WholeConfig) -> Iterator[Violation]:
    """No expert may take more than all tokens, and no other capacity may be set."""
    name = section.name
    for group_name, group in config.model.moe.groups.items():
        prefix = f"model.moe.groups.{group_name}"
        if section.capacity is None and group.top_k > group.num_experts:
            problem = (
                f"{prefix}.top_k={group.top_k}: with {name} each of {group.num_experts} experts would take more than all "
                f"tokens; lower it to at most {group.num_experts}"
            )
            yield Violation((f"{prefix}.top_k", f"{prefix}.num_experts", f"{ROUTER}.kind"), problem)
    if config.model.moe.capacity is not None:
        problem = (
            f"model.moe.capacity: with {name} each expert takes its capacity and nothing is dropped; set "
            f"model.moe.capacity to null, and {ROUTER}.capacity to the share that an expert takes"
        )
        yield Violation(("model.moe.capacity", f"{ROUTER}.kind"), problem)


def _causal(section: ExpertChoiceRouterSection, config: WholeConfig) -> Iterator[Violation]:
    keys = (f"{ROUTER}.causal", "train.only")
    if section.causal is None:
        problem = (
            f"{ROUTER}.causal=null: held-out evaluation would choose among tokens by later ones, which no use of the model "
            f"knows; set {ROUTER}.causal=threshold, or auxiliary in a second stage"
        )
        yield Violation(keys[:1], problem)
    if section.causal == "auxiliary" and config.train.only is None:
        problem = (
            f"{ROUTER}.causal=auxiliary: auxiliary routers are trained in a second stage, and train.only=null trains the "
            f"rest; train first with {ROUTER}.causal=threshold, then start a run with train.only=auxiliary_routers and "
            "run.init_from naming the first"
        )
        yield Violation(keys, problem)


def _mixture_of_depths(section: ExpertChoiceRouterSection, config: WholeConfig) -> Iterator[Violation]:
    """Known counts need the number of tokens beforehand: that of a whole micro-batch is known, that in a mixture-of-depths
    layer is not."""
    if config.model.mixture_of_depths is None or (section.scope == "rank" and not section.noise):
        return
    said = f"scope={section.scope}" if section.scope != "rank" else f"noise={section.noise:g}"
    problem = (
        f"{ROUTER}.{said} with model.mixture_of_depths: which tokens reach the experts of such a layer is known "
        f"in it alone; set {ROUTER}.scope=rank and {ROUTER}.noise=0, or model.mixture_of_depths to null"
    )
    yield Violation((f"{ROUTER}.scope", f"{ROUTER}.noise", "model.mixture_of_depths"), problem)


def _second_stage(section: ExpertChoiceRouterSection, config: WholeConfig) -> Iterator[Violation]:
    if config.train.only != "auxiliary_routers":
        return
    if config.run.init_from is None:
        problem = (
            f"train.only={config.train.only}: freezes the model, and run.init_from=null leaves it untrained; set "
            "run.init_from to the run of the first stage"
        )
        yield Violation(("train.only", "run.init_from"), problem)
    if section.noise:
        problem = (
            f"{ROUTER}.noise={section.noise:g}: the auxiliary routers of train.only={config.train.only} would learn "
            f"choices that the noise made; set {ROUTER}.noise=0"
        )
        yield Violation(("train.only", f"{ROUTER}.noise"), problem)
