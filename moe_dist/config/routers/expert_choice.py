from collections.abc import Iterator
from typing import Any, Literal

from pydantic import PositiveFloat

from moe_dist.config.base.section import (
    Count,
    Decay,
    NonNegative,
    PositiveInt,
    ShareByGroup,
    Violation,
    WholeConfig,
    unknown_name,
    unmet,
    unordered,
)
from moe_dist.config.routers.base import ROUTER, RouterSection


class ExpertChoiceRouterSection(RouterSection):
    """In training, each expert chooses its tokens (MoMa). In evaluation, each token is routed independently."""

    builds = "moe_dist.moe.routers.expert_choice:ExpertChoiceRouter"
    served = "expert_choice"

    # Each true expert takes a fixed fraction of the tokens, independently of other columns. Null, identity and constant
    # experts therefore cannot lower a token's number of true experts, as they can if tokens choose. A null expert would
    # have no effect, because a token may have no expert anyway. An identity expert would only add s x to the output of its
    # tokens, and a constant expert s (a1 x + a2 v).
    only_true_experts = True

    experts_choose = True
    fixed_choices = False
    needs_global_batch_info = True
    needs = (
        ("loss.z", (0.0,), "expert choice computes no z-loss, because its scores are no softmax"),
        ("model.moe.capacity", (None,), f"no pair is dropped; {ROUTER}.capacity is the share that an expert takes"),
    )

    kind: Literal["expert_choice"] = "expert_choice"
    capacity: ShareByGroup | None = None
    """Fraction of its group's tokens in `scope` that each expert takes (c), as one number or by group. For groups without a
    number the fraction is top_k / num_experts, with which top_k experts take a token on average."""
    capacity_schedule: tuple[tuple[Count, PositiveFloat], ...] = ((0, 1.0),)
    """Pairs (first step, factor of the capacities). [[0, 2.0], [1000, 1.0]] doubles capacities in the first 1,000 steps."""
    scope: Literal["rank", "ep_group", "world"] = "rank"
    """Ranks whose tokens compete for an expert: the micro-batch of one rank, of an EP group, or of all ranks. ep_group and
    world exchange the router's logits in each layer."""
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    """Score by which an expert chooses tokens; it is also the weight of the expert's output. sigmoid: the sigmoid of the
    expert's logit (MoMa). softmax: the softmax over the experts of the token's group."""
    noise: NonNegative = 0.0
    """Scale of Gumbel-sigmoid noise in training: scores are sigmoid(x + noise (G' - G'')). MoMa uses 1 after upcycling."""
    causal: Literal["threshold", "auxiliary"] | None = None
    """Required. Rule by which evaluation routes tokens without using later tokens. threshold: an expert takes the tokens
    whose score is above a running mean of the lowest score that it took in training. auxiliary: auxiliary routers, which a
    second stage trains (train.only), route the tokens."""
    threshold_decay: Decay = 0.99
    """Decay per step of the running means for causal=threshold. The means cover about 1 / (1 - decay) steps."""

    @property
    def has_auxiliary_routers(self) -> bool:
        return self.causal == "auxiliary"

    def further_tensors(self, group: Any, hidden_dim: int) -> dict[str, tuple[int, ...]]:
        num, inner_dim = group.num_experts, max(1, hidden_dim // 2)
        auxiliary = {"auxiliary.inner": (inner_dim, hidden_dim), "auxiliary.outer": (num, inner_dim)}
        return {"threshold": (num,), "statistics": (2, num), **(auxiliary if self.has_auxiliary_routers else {})}

    def token_share(self, name: str, group: Any, target: float | None = None) -> float:
        return self._named_capacity(name) or group.top_k / group.num_experts

    def _named_capacity(self, name: str) -> float | None:
        return self.capacity.get(name) if isinstance(self.capacity, dict) else self.capacity

    @property
    def _varies(self) -> bool:
        return any(factor != 1.0 for _, factor in self.capacity_schedule)

    def violations(self) -> Iterator[Violation]:
        yield from unordered(self.capacity_schedule, "capacity_schedule")

    def most_columns(self, group: Any) -> int:
        return group.num_experts  # each expert chooses independently of other experts

    def counts_unknown(self) -> str:
        if self.scope == "rank":
            return ""
        return f"with {ROUTER}.scope={self.scope} they depend on the scores of other ranks; set {ROUTER}.scope=rank"

    def not_causal(self) -> str:
        if self.causal is not None:
            return ""
        return (
            f"{ROUTER}.causal=null: the choice of experts looks at later tokens, and the run has no causal router; train "
            "one with causal=threshold or causal=auxiliary, and generate from that"
        )

    def keywords(self) -> dict[str, Any]:
        return self.model_dump(exclude={"kind", "scope"})  # the caller passes the scope as an object

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        for rule in (_loss, _groups, _score, _causal, _mixture_of_depths, _second_stage):
            yield from rule(self, config)


def _loss(section: ExpertChoiceRouterSection, config: WholeConfig) -> Iterator[Violation]:
    """Rejects a balance loss, because with expert choice the loads are balanced anyway."""
    schedule = config.loss.balance.schedule
    if any(coefficient for _, coefficient in schedule):
        problem = (
            f"loss.balance.schedule={[list(pair) for pair in schedule]}: {section.name} with token-choice losses; each "
            "expert already takes its share of the tokens: set loss.balance.schedule=[[0, 0]]"
        )
        yield Violation(("loss.balance.schedule", f"{ROUTER}.kind"), problem)


def _groups(section: ExpertChoiceRouterSection, config: WholeConfig) -> Iterator[Violation]:
    """Checks that no capacity asks an expert to take more than all tokens, and that the groups in `capacity` exist."""
    name, groups, key = section.name, config.model.moe.groups, f"{ROUTER}.capacity"
    for group_name in section.capacity if isinstance(section.capacity, dict) else ():
        if problem := unknown_name("group", group_name, groups):
            yield Violation((key, "model.moe.groups"), f"{key}.{group_name}: {problem}")
    most = max((factor for _, factor in section.capacity_schedule), default=1.0)
    for group_name, group in groups.items():
        prefix, share = f"model.moe.groups.{group_name}", section.token_share(group_name, group)
        if section._varies and share <= 1.0 and most * share > 1.0 + 1e-9:
            problem = (
                f"{key}_schedule: the factor {most:g} times the capacity {share:g} of group {group_name} is above 1, but "
                f"no expert takes more than all tokens; lower the factor to at most {1 / share:g}, or the capacity to at "
                f"most {1 / most:g}"
            )
            yield Violation((f"{key}_schedule", key, f"{prefix}.top_k", f"{prefix}.num_experts"), problem)
        if section._named_capacity(group_name) is None and group.top_k > group.num_experts:
            problem = (
                f"{prefix}.top_k={group.top_k}: with {name} each of {group.num_experts} experts would take more than all "
                f"tokens; lower it to at most {group.num_experts}"
            )
            yield Violation((f"{prefix}.top_k", f"{prefix}.num_experts", f"{ROUTER}.kind"), problem)


def _score(section: ExpertChoiceRouterSection, config: WholeConfig) -> Iterator[Violation]:
    """Rejects two settings that do not work with score=softmax. In a group of one expert, the score would be 1 for every
    token. Noise is defined only for sigmoids."""
    if section.score != "softmax":
        return
    for group_name, group in config.model.moe.groups.items():
        if group.num_experts == 1:
            problem = (
                f"{ROUTER}.score=softmax: the softmax over the one expert of group {group_name} is 1 for every token; set "
                f"{ROUTER}.score=sigmoid, or raise model.moe.groups.{group_name}.num_experts"
            )
            yield Violation((f"{ROUTER}.score", f"model.moe.groups.{group_name}.num_experts"), problem)
    if section.noise:
        problem = (
            f"{ROUTER}.score=softmax: {ROUTER}.noise={section.noise:g} is the noise of a Gumbel-sigmoid; set "
            f"{ROUTER}.noise=0, or {ROUTER}.score=sigmoid"
        )
        yield Violation((f"{ROUTER}.score", f"{ROUTER}.noise"), problem)


def _causal(section: ExpertChoiceRouterSection, config: WholeConfig) -> Iterator[Violation]:
    keys = (f"{ROUTER}.causal", "train.only")
    if section.causal is None:
        problem = (
            f"{ROUTER}.causal=null: held-out evaluation would route a token by later tokens, which generation does not "
            f"know; set {ROUTER}.causal=threshold, or auxiliary in a second stage"
        )
        yield Violation(keys[:1], problem)
    if section.causal == "auxiliary" and config.train.only is None:
        problem = (
            f"{ROUTER}.causal=auxiliary: auxiliary routers are trained in a second stage, but train.only=null trains all "
            f"other weights; train first with {ROUTER}.causal=threshold, then start a run with "
            "train.only=auxiliary_routers and run.init_from naming the first"
        )
        yield Violation(keys, problem)


def _mixture_of_depths(section: ExpertChoiceRouterSection, config: WholeConfig) -> Iterator[Violation]:
    """Rejects three settings that do not work with mixture of depths. Noise and scopes of several ranks do not work,
    because only the layer knows which tokens reach the experts. A schedule does not work, because the layer's router does
    not get the step."""
    if config.model.mixture_of_depths is None:
        return
    inside = "which tokens reach the experts of such a layer is known only inside the layer"
    steps = section.capacity_schedule
    needs = (
        (f"{ROUTER}.scope", ("rank",), inside),
        (f"{ROUTER}.noise", (0.0,), inside),
        (
            f"{ROUTER}.capacity_schedule",
            (steps if len({factor for _, factor in steps}) == 1 else steps[:1],),
            "it gets no step",
        ),
    )
    key = "model.mixture_of_depths"
    yield from unmet(config, key, key, needs, instead=f"set {key}=null")


def _second_stage(section: ExpertChoiceRouterSection, config: WholeConfig) -> Iterator[Violation]:
    if config.train.only != "auxiliary_routers":
        return
    if config.run.init_from is None:
        problem = (
            f"train.only={config.train.only}: the model is frozen, and run.init_from=null leaves it untrained; set "
            "run.init_from to the run of the first stage"
        )
        yield Violation(("train.only", "run.init_from"), problem)
    if section.noise:
        problem = (
            f"{ROUTER}.noise={section.noise:g}: the auxiliary routers of train.only={config.train.only} would learn "
            f"choices that the noise caused; set {ROUTER}.noise=0"
        )
        yield Violation(("train.only", f"{ROUTER}.noise"), problem)
    if len({factor for _, factor in section.capacity_schedule}) > 1:
        problem = (
            f"{ROUTER}.capacity_schedule with train.only={config.train.only}: the steps of this run count from 0, so that "
            "the auxiliary routers would learn the capacities of the first stage's start; set "
            "capacity_schedule=[[0, FACTOR]] with the first stage's last factor"
        )
        yield Violation(("train.only", f"{ROUTER}.capacity_schedule"), problem)


class ExpertThresholdRouterSection(ExpertChoiceRouterSection):
    """Each expert takes the tokens whose score exceeds its running threshold, also in training (Expert Threshold)."""

    builds = "moe_dist.moe.routers.expert_threshold:ExpertThresholdRouter"
    served = "expert_threshold"

    # A narrower type is safe here, because fields are frozen.
    kind: Literal["expert_threshold"] = "expert_threshold"  # pyright: ignore[reportIncompatibleVariableOverride]
    causal: Literal["threshold"] = "threshold"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Evaluation routes by the same thresholds as training, after a calibration (evaluation.calibration)."""
    warmup_steps: PositiveInt = 100
    """Number of first steps, in which experts choose tokens as in expert choice. A shorter run uses expert choice to its
    end."""

    def counts_unknown(self) -> str:
        return f"with {self.name} they depend on the thresholds; set {ROUTER}.kind=expert_choice with {ROUTER}.scope=rank"
