"""Defines the base class of the routers' sections. Other code reads the properties of a section and never compares its
`kind`, so that a new kind of router needs no change elsewhere."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from moe_dist.config.base.section import KindSection, Need, Violation, WholeConfig, named, unmet

ROUTER = "model.moe.router"
OTHERS = ("num_null", "num_identity", "num_constant")  # keys of a group's null and zero-computation experts


class RouterSection(KindSection):
    """The rule that assigns tokens to experts.

    The defaults of the properties apply to a router with which each token takes top_k columns of its expert group (one
    column per expert, null experts included). Other kinds of routers override them. The keys selection_bias, null_logit,
    normalise, scale and scope have the same meaning in all kinds.
    """

    softmax_top_k: ClassVar[bool] = False  # true if a token takes the k best of one softmax over this layer's own logits
    experts_choose: ClassVar[bool] = False  # true if each expert chooses its tokens in training
    fixed_choices: ClassVar[bool] = True  # true if each token has top_k (token, expert) pairs; some may be absent
    needs_global_batch_info: ClassVar[bool] = False  # true if choices depend on the token's place in the global batch
    needs_previous: ClassVar[bool] = False  # true if a layer's logits depend on the previous MoE layer's logits
    only_true_experts: ClassVar[bool] = False  # true if groups must not have null or zero-computation experts
    needs: ClassVar[tuple[Need, ...]] = ()  # values that the router needs in other keys of the configuration
    adapted: ClassVar[bool] = False  # true if a model with this router can be the base of LoRA adapters on experts
    hosted: ClassVar[str] = ""  # router class for engine.kind=transformers; empty if that engine cannot use this kind

    @property
    def name(self) -> str:
        """The setting that selects this router, as on the command line."""
        return f"{ROUTER}.kind={self.kind}"

    @property
    def said(self) -> str:
        """The section's keys and values as one line of text."""
        return ", ".join(f"{key}: {value}" for key, value in self.model_dump(mode="json").items())

    @property
    def has_selection_bias(self) -> bool:
        """True if the router has a selection bias, which load controllers change."""
        return getattr(self, "selection_bias", False)

    @property
    def has_auxiliary_routers(self) -> bool:
        return False

    @property
    def has_logit_bias(self) -> bool:
        """True if a learned bias is added to each column's logit."""
        return getattr(self, "logit_bias", False)

    @property
    def single_null_row(self) -> bool:
        """Whether all null experts share one row of the router."""
        return getattr(self, "null_logit", "each") == "single"

    @property
    def normalises_chosen(self) -> bool:
        """True if a token's routing weights are divided by their sum over its chosen (or its chosen true) experts."""
        return getattr(self, "normalise", "none") in ("true_chosen", "all_chosen")

    @property
    def sum_of_weights(self) -> float | None:
        """Sum of a token's routing weights if it has at least one true expert; None if the sum differs between tokens."""
        return getattr(self, "scale", 1.0) if getattr(self, "normalise", "none") == "true_chosen" else None

    def further_tensors(self, group: Any, hidden_dim: int) -> dict[str, tuple[int, ...]]:
        """Maps the last parts of names to the shapes of a group's saved tensors, without router rows and biases."""
        return {}

    def further_parameters(self, columns: int) -> int:
        """Returns the number of parameters of a group with `columns` columns in each MoE layer except the first, without
        router rows and biases."""
        return 0

    def equal_score(self, group: Any) -> float:
        """Returns the score, without bias, that each column of a group has if all logits are 0."""
        return 1.0 / (group.num_experts + group.num_null + group.num_zero_computation)

    def equal_share(self, group: Any) -> int | None:
        """Returns the N for which scale / N is the weight of each true expert of a group, if all scores are equal. Returns
        None if a token would not take all true experts of the group."""
        return None

    @property
    def selection_scope(self) -> Literal["rank", "ep_group", "world"]:
        """The ranks whose tokens compete for an expert: one rank, the ranks of an EP group, or all ranks."""
        return getattr(self, "scope", "rank")

    @property
    def node_limit(self) -> tuple[int, int]:
        """Number of node groups in each expert group, and largest number of node groups that a token uses."""
        return (1, 1)

    def token_share(self, name: str, group: Any, target: float | None = None) -> float | None:
        """Returns the mean fraction of a group's tokens that each expert of the group takes; None if each token chooses
        top_k columns. `target` is a controller's target for the number of true experts per token."""
        return None

    def most_columns(self, group: Any) -> int:
        """Returns the largest number of columns that a token of a group takes."""
        return group.top_k

    def active_range(self, group: Any) -> tuple[float, float]:
        """Returns the smallest and the largest mean number of true experts per token that a controller can reach."""
        others = group.num_null + group.num_zero_computation
        most = min(group.top_k, group.num_experts)
        return (max(0, group.top_k - others), most) if others else (group.top_k, group.top_k)

    def build_hosted(self, *context: Any) -> Any:
        """Makes the router that converts a family's choices to this project's routing (engine.kind=transformers)."""
        return named(self.hosted)(*context, **self.keywords())

    def counts_unknown(self) -> str:
        """Returns the reason why the number of tokens that each rank sends to each expert is unknown before routing; an
        empty text if it is known."""
        return f"with {self.name} the tokens choose; set {ROUTER}.kind=expert_choice with {ROUTER}.scope=rank"

    def not_causal(self) -> str:
        """Returns the reason why a token's routing in evaluation depends on later tokens, and a fix; an empty text if
        routing is causal."""
        return ""

    def file_violations(self, config: WholeConfig) -> Iterator[Violation]:
        """Checks the files that the section names. A dry run omits this check, because its machine may lack the files."""
        yield from ()

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from unmet(config, f"{ROUTER}.kind", self.name, self.needs, instead=f"set {ROUTER}.kind=top_k")
        if config.train.only == "auxiliary_routers" and not self.has_auxiliary_routers:
            problem = (
                f"train.only={config.train.only}: {self.name} has no auxiliary routers; set train.only to null, or "
                f"{ROUTER}.kind=expert_choice with {ROUTER}.causal=auxiliary"
            )
            yield Violation(("train.only", f"{ROUTER}.kind"), problem)
        for group, section in config.model.moe.groups.items() if self.only_true_experts else ():
            for name in OTHERS:
                if count := getattr(section, name):
                    key = f"model.moe.groups.{group}.{name}"
                    problem = f"{key}={count}: {self.name} needs true experts only; set it to 0, or {ROUTER}.kind=top_k"
                    yield Violation((key, f"{ROUTER}.kind"), problem)


class AdaptiveRouterSection(RouterSection):
    """The base of routers that choose the number of columns (experts) for each token, up to the group's top_k. Their
    selection biases affect this number, so only controllers with a target may change these biases."""

    least_columns: ClassVar[int] = 0  # smallest number of columns that a token takes

    @property
    def has_selection_bias(self) -> bool:
        return True

    def token_share(self, name: str, group: Any, target: float | None = None) -> float | None:
        return None if target is None else target / group.num_experts

    def active_range(self, group: Any) -> tuple[float, float]:
        others = group.num_null + group.num_zero_computation
        return (0 if others else self.least_columns, min(group.top_k, group.num_experts))

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        for section in config.model.moe.balance:
            if not section.targets:
                problem = (
                    f"model.moe.balance with kind {section.kind}: {self.name} takes the mean of the selection biases as "
                    "the number of experts, which this controller changes without a target; remove it, and set per=expert "
                    "in active_experts to balance experts"
                )
                yield Violation(("model.moe.balance", f"{ROUTER}.kind"), problem)
