"""The schema of the sections `parallel` and `placement`: how ranks share the work, and which rank holds which expert."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config import dispatchers
from moe_dist.config.base.kinds import kinds_in
from moe_dist.config.base.section import (
    WATCHDOG_SHARE,
    Count,
    Label,
    Name,
    PositiveInt,
    Ranks,
    Section,
    Violation,
    WholeConfig,
    unmet,
)
from moe_dist.config.dispatchers.all_to_all import AllToAllDispatchSection
from moe_dist.config.dispatchers.base import DispatchSection

if TYPE_CHECKING:  # type checkers cannot see the union that is made at run time, so they get the base class
    AnyDispatch = DispatchSection
else:
    AnyDispatch = kinds_in(dispatchers, DispatchSection, default="all_to_all")
LOSS_WORDS = 8192  # words whose logits the loss computes at once, for a vocabulary of more than WHOLE_VOCABULARY words
WHOLE_VOCABULARY = 65_536
GROUPED_STEP = {"bf16": 8, "fp32": 4}  # elements in 16 bytes: grouped GEMM needs row strides that are multiples of 16 bytes


class KernelsSection(Section):
    """Kernels that gather, weight and sum rows around the experts' matrix products. torch: operations of torch. triton:
    this project's Triton kernels, on CUDA. auto: triton on CUDA where the package triton is installed, else torch."""

    kind: Literal["auto", "torch", "triton"] = "auto"


class ParallelSection(Section):
    """Distribution of the work over ranks, and precision."""

    ep: Ranks = Field(default=1, description="Number of ranks over which the experts are sharded: an EP group.")
    edp: Ranks = Field(default=1, description="Number of EP groups; each holds all experts. The world size is ep x edp.")
    data: Literal["ddp", "fsdp2"] = "ddp"
    """ddp replicates the parameters that are not experts on all ranks. fsdp2 shards all parameters except routers."""
    fsdp_gather: Literal["micro_batch", "step"] = "micro_batch"
    """How often fsdp2 gathers parameters and sums gradients over ranks: in each micro_batch, or once in a step. step sends
    less, but keeps all parameters that a rank computes with (in the compute data type) and their gradients (in fp32) from
    the first micro-batch to the last."""
    recompute: Literal["none", "experts", "block"] = "none"
    """Activations that backward computes again. experts: activations of the experts' FFNs; no exchange is repeated. block:
    activations of attention and MoE layers; the dispatch exchange is repeated, but not the routing."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Data type of the computation. Master weights and gradient sums are always fp32."""
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes CUDA if there is a GPU.")
    expert_pair_budget: PositiveInt | None = None
    """(token, expert) pairs that the experts of a rank compute at once. More pairs are computed in chunks, with
    recomputation in backward. null: no bound."""
    expert_gemm: Literal["auto", "grouped", "loop"] = "auto"
    """Matrix products of the experts: torch's grouped GEMM, or a loop over experts. auto takes grouped where the widths
    allow it and grouped is faster: on CUDA in bf16, and on a CPU with at least 16 experts of a group per rank."""
    kernels: KernelsSection = KernelsSection()
    """Kernels around the experts' matrix products."""
    compile: bool = False
    """Compile norms, projections, dense and shared FFNs and the cross entropy by torch.compile. This fuses their
    operations, and takes a minute at the start. Attention is compiled on CUDA in any case."""
    loss_words: PositiveInt | None = None
    """Words of the vocabulary whose logits the loss computes at once, for the tokens of one sequence. If the vocabulary has
    more words, backward computes all logits again (docs/parallelism.md). null: all words of a vocabulary up to 65,536, else
    8,192."""
    max_receive_rows: PositiveInt | None = None
    """Largest number of rows that a rank may receive in one layer. More rows raise an error before the buffer is allocated.
    null: no bound, the largest possible number is (ep - 1) x the tokens of a micro-batch."""
    dispatch: AnyDispatch = Field(default_factory=AllToAllDispatchSection)
    """Exchange that brings rows to the ranks of their experts and back."""
    two_batch_overlap: bool = False
    """Cut each micro-batch of training into halves, and exchange the rows of one half while the other half is computed.
    Needs an even train.micro_batch and dispatch.kind=all_to_all (docs/parallelism.md)."""
    deterministic: bool = False
    """Repeat a run bit for bit on the same layout. On CUDA this uses slower kernels without atomic additions, and an
    operation without a repeatable kernel is an error. A CPU run always repeats."""
    start_seconds: PositiveFloat = 1800.0
    """Seconds that a rank waits at a start for missing ranks: nodes start at different times, containers and imports may
    take long, and rank 0 may wait 90 s for an earlier attempt to end. The log names the missing ranks every 30 s."""
    timeout_seconds: PositiveFloat = Field(default=600.0, description="A collective that takes longer ends the run.")
    watchdog_seconds: PositiveFloat | None = None
    """Seconds after which the watchdog ends a run that waits for a collective: every rank writes its position, and the
    report names the rank that the others wait for. null means 0.8 x timeout_seconds, which is also the largest allowed
    value."""
    check_exchanges: bool = False
    """Compare a checksum of every exchanged row; a damaged row is an error with layer, ranks and row. For debugging,
    because it is slow (docs/parallelism.md)."""

    @property
    def resolved_watchdog_seconds(self) -> float:
        return self.watchdog_seconds or WATCHDOG_SHARE * self.timeout_seconds

    def loss_words_of(self, vocab_size: int) -> int | None:
        """Returns the number of vocabulary words whose logits the loss computes at once; None if the loss computes all
        logits at once."""
        words = self.loss_words or (LOSS_WORDS if vocab_size > WHOLE_VOCABULARY else vocab_size)
        return words if words < vocab_size else None

    def violations(self) -> Iterator[Violation]:
        if self.resolved_watchdog_seconds > WATCHDOG_SHARE * self.timeout_seconds:
            problem = (
                f"watchdog_seconds={self.watchdog_seconds:g} must be at most {WATCHDOG_SHARE:g} x timeout_seconds="
                f"{self.timeout_seconds:g}, since the ranks need time for their reports; lower it, or raise timeout_seconds"
            )
            yield Violation(("watchdog_seconds", "timeout_seconds"), problem)

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        """Checks that `compile`, `two_batch_overlap` and `expert_gemm: grouped` fit the precision and the widths. Does
        not check which device this machine has."""
        if self.compile and config.model.attention_lora is not None:
            problem = (
                "parallel.compile=true: model.attention_lora draws dropout by the number of the step, for which torch "
                "would compile anew in each step; set parallel.compile to false, or model.attention_lora to null"
            )
            yield Violation(("parallel.compile", "model.attention_lora"), problem)
        depths = config.model.mixture_of_depths
        if self.compile and self.device != "cuda" and depths is not None and depths.scope != "rank":
            problem = (
                f"parallel.compile=true: with model.mixture_of_depths.scope={depths.scope} the number of computed tokens "
                "differs in each step, and off CUDA torch would compile anew for each; set parallel.compile to false"
            )
            yield Violation(("parallel.compile", "model.mixture_of_depths.scope"), problem)
        if self.two_batch_overlap:
            yield from two_batch_violations(config)
        if self.expert_gemm != "grouped":
            return
        if self.device == "cuda" and self.precision != "bf16":
            problem = (
                f"parallel.expert_gemm=grouped: on CUDA torch has grouped kernels for bf16 only, but "
                f"parallel.precision={self.precision}; take bf16, or parallel.expert_gemm=auto"
            )
            yield Violation(("parallel.expert_gemm", "parallel.device", "parallel.precision"), problem)
        step = GROUPED_STEP[self.precision]
        widths = {"model.hidden_dim": config.model.hidden_dim}
        widths |= {f"model.moe.groups.{name}.ffn_dim": group.ffn_dim for name, group in config.model.moe.groups.items()}
        for key, width in widths.items():
            if width % step:
                problem = (
                    f"{key}={width}: must be a multiple of {step} for parallel.expert_gemm=grouped in {self.precision} "
                    f"(rows of 16 bytes); take {width + -width % step}, or parallel.expert_gemm=auto"
                )
                yield Violation((key, "parallel.expert_gemm", "parallel.precision"), problem)


TWO_BATCH = "parallel.two_batch_overlap"
TWO_BATCH_NEEDS = (
    ("parallel.dispatch", (AllToAllDispatchSection(),), "rows are sent at once, by the halves in turns"),
    ("parallel.recompute", ("none", "experts"), "a block would repeat exchanges between those of the other half"),
    ("model.mixture_of_depths", (None,), "tokens of both halves compete for a layer"),
    ("model.moe.router.needs_global_batch_info", (False,), "a token's experts must not depend on its micro-batch"),
    ("model.moe.router.needs_previous", (False,), "a layer must not need the logits of the layer before"),
    ("model.moe.shortcut", (False,), "the output of experts is added behind the next layer of its half"),
    ("model.moe.capacity", (None,), "tokens of both halves compete for it"),
    ("model.moe.experts.replicated", (False,), "only experts that are sharded exchange rows"),
    ("model.attention_lora.dropout", (0.0,), "the dropout of adapters is drawn for a whole micro-batch"),
    ("model.moe.experts.dropout", (0.0,), "the dropout of adapters is drawn for a whole micro-batch"),
    ("router_tuning", (None,), "router tuning reads the probabilities of single tokens of a micro-batch"),
)


def two_batch_violations(config: WholeConfig) -> Iterator[Violation]:
    """Returns a violation for each setting with which `parallel.two_batch_overlap` cannot be combined."""
    parallel, instead = config.parallel, f"set {TWO_BATCH}=false"
    yield from unmet(config, TWO_BATCH, f"{TWO_BATCH}=true", TWO_BATCH_NEEDS, instead=instead)
    if config.train.micro_batch % 2:
        problem = f"train.micro_batch={config.train.micro_batch} has no two equal halves; make it even"
        yield Violation((TWO_BATCH, "train.micro_batch"), f"{TWO_BATCH}=true: {problem}, or {instead}")
    if parallel.data == "fsdp2" and parallel.fsdp_gather != "step":
        problem = (
            "with parallel.data=fsdp2 parameters are gathered before the first layer, so that no gather comes between "
            "exchanges; set parallel.fsdp_gather=step"
        )
        yield Violation((TWO_BATCH, "parallel.fsdp_gather"), f"{TWO_BATCH}=true: {problem}, or {instead}")


class NodeSection(Section):
    """Nodes on which the ranks of an expert group must run."""

    feature: Name | None = None
    """Slurm: feature that the node must have (--constraint). Ray, if labels is empty: value of the node's label `feature`.
    null: any node."""
    labels: dict[Label, Label] = Field(
        default_factory=dict, description="Ray: labels that the node must have, name and value."
    )
    own: bool = Field(default=False, description="Use whole nodes, on which no rank of another group runs.")


class PinnedGroupSection(Section):
    """Ranks and nodes of one expert group."""

    ranks: tuple[Count, ...] = ()
    """Positions in the EP group that hold the group's experts. Empty: the planner chooses them."""
    node: NodeSection = Field(default_factory=NodeSection)
    """Nodes on which the group's ranks must run; by default any node."""


class InterleavedSection(Section):
    """The experts of every expert group are spread evenly over all ranks of an EP group."""

    policy: Literal["interleaved"] = "interleaved"


class PinnedSection(Section):
    """Each expert group has its own ranks. Ranks that no group names are divided among the other groups, in proportion to
    the groups' loads."""

    policy: Literal["pinned"] = "pinned"
    groups: dict[Name, PinnedGroupSection] = Field(default_factory=dict, description="Ranks of each group, by name.")


class ExplicitSection(Section):
    """The experts of each rank are listed. A rank may have any number of experts, or none."""

    policy: Literal["explicit"] = "explicit"
    slots: tuple[tuple[str, ...], ...] = Field(description="Experts of each rank of an EP group, as 'group/index'.")


PlacementSection = Annotated[InterleavedSection | PinnedSection | ExplicitSection, Field(discriminator="policy")]
