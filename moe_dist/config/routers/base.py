"""The base class of the sections of routers. Other code reads the properties of a router's section and never compares
`kind`, so that a new kind of router needs no change elsewhere."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from moe_dist.config.base.section import KindSection, Need, Violation, WholeConfig, unmet

ROUTER = "model.moe.router"
OTHERS = ("num_null", "num_identity", "num_constant")  # keys of a group's null and zero-computation experts


class RouterSection(KindSection):
    """The rule that assigns tokens to experts.

    The properties return the values for a router with which each token takes top_k columns (one column per expert, null
    experts included) of its expert group; other kinds of router override the properties. The keys selection_bias,
    null_logit, normalise, scale and scope mean the same in all kinds that have them.
    """

    softmax_top_k: ClassVar[bool] = False  # true if a token takes the top k of one softmax over logits of this layer's rows
    experts_choose: ClassVar[bool] = False  # true if in training each expert chooses its tokens
    fixed_choices: ClassVar[bool] = True  # true if each token has top_k (token, expert) pairs, of which some may be absent
    needs_global_batch_info: ClassVar[bool] = False  # true if a token's choices depend on its place in the global batch
    needs_previous: ClassVar[bool] = False  # true if a layer's logits depend on the previous MoE layer's logits
    only_true_experts: ClassVar[bool] = False  # true if groups must not have null or zero-computation experts
    needs: ClassVar[tuple[Need, ...]] = ()  # values that the router needs elsewhere in the configuration
    adapted: ClassVar[bool] = False  # true if a model with this router can be the base of LoRA adapters on its experts

    @property
    def name(self) -> str:
        """The key and value that select this router, as on the command line."""
        return f"{ROUTER}.kind={self.kind}"

    @property
    def said(self) -> str:
        """The section's keys and values as one line of text."""
        return ", ".join(f"{key}: {value}" for key, value in self.model_dump(mode="json").items())

    @property
    def has_selection_bias(self) -> bool:
        """Whether the router has a selection bias, which load controllers change."""
        return getattr(self, "selection_bias", False)

    @property
    def has_auxiliary_routers(self) -> bool:
        return False

    @property
    def has_logit_bias(self) -> bool:
        """Whether each column has a learned bias of its logit."""
        return getattr(self, "logit_bias", False)

    @property
    def single_null_row(self) -> bool:
        """Whether all null experts share one row of the router."""
        return getattr(self, "null_logit", "each") == "single"

    @property
    def normalises_chosen(self) -> bool:
        """Whether a token's routing weights are divided by their sum over the chosen (or chosen true) experts."""
        return getattr(self, "normalise", "none") in ("true_chosen", "all_chosen")

    @property
    def sum_of_weights(self) -> float | None:
        """Sum of the routing weights of a token with at least one true expert; None if the sum differs between tokens."""
        return getattr(self, "scale", 1.0) if getattr(self, "normalise", "none") == "true_chosen" else None

    def further_tensors(self, group: Any, hidden_dim: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a group's saved tensors besides router rows and biases; the keys are the ends of the
        tensors' names."""
        return {}

    def further_parameters(self, columns: int) -> int:
        """Number of a group's parameters besides rows and biases in each MoE layer but the first; the group has
        `columns` columns."""
        return 0

    def equal_score(self, group: Any) -> float:
        """Returns the score of each column of a group, without biases, if all logits are 0."""
        return 1.0 / (group.num_experts + group.num_null + group.num_zero_computation)

    def equal_share(self, group: Any) -> int | None:
        """Returns N, where scale / N is the weight of each true expert of a group if all scores are equal and a token
        takes all true experts. Returns None if a token would not take all true experts."""
        return None

    def growth_of_scale(self, parts: int) -> int | None:
        """Returns the factor by which `scale` must grow if each column becomes `parts` equal columns, so that the equal
        columns together have the former column's weight; None if tokens would then take other columns."""
        return None

    @property
    def selection_scope(self) -> Literal["rank", "ep_group", "world"]:
        """The ranks whose tokens compete for an expert: only the token's own rank, all ranks of its EP group, or all
        ranks."""
        return getattr(self, "scope", "rank")

    @property
    def node_limit(self) -> tuple[int, int]:
        """Number of node groups of each expert group, and number of node groups whose experts a token may take."""
        return (1, 1)

    def token_share(self, name: str, group: Any, target: float | None = None) -> float | None:
        """Returns the mean share of a group's tokens that each expert of the group takes; None if each token chooses top_k
        columns. `target` is the number of true experts per token at which a controller aims."""
        return None

    def most_columns(self, group: Any) -> int:
        """Returns the largest number of columns that a token of a group takes."""
        return group.top_k

    def active_range(self, group: Any) -> tuple[float, float]:
        """Returns the least and the largest mean number of true experts per token that a controller can reach."""
        others = group.num_null + group.num_zero_computation
        most = min(group.top_k, group.num_experts)
        return (max(0, group.top_k - others), most) if others else (group.top_k, group.top_k)

    def counts_unknown(self) -> str:
        """Says why the number of tokens that each rank sends to each expert is unknown before routing; empty if the number
        is known."""
        return f"with {self.name} the tokens choose; set {ROUTER}.kind=expert_choice with {ROUTER}.scope=rank"

    def not_causal(self) -> str:
        """Says why a token's routing in evaluation depends on later tokens, with a fix; empty if routing is causal."""
        return ""

    def file_violations(self, config: WholeConfig) -> Iterator[Violation]:
        """Checks the files that the section names. A dry run, on a machine that may lack them, does not check them."""
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
    """The base of routers in which the number of columns (experts) that a token takes depends on the token, and is at most
    the group's top_k. Only controllers with a target may change the selection biases of an adaptive router, because these
    biases set how many columns a token takes."""

    least_columns: ClassVar[int] = 0  # least number of columns that each token takes

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
