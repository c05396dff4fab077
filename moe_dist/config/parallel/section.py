"""Defines the sections `parallel` (how ranks share the work) and `placement` (which rank has which expert)."""

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
from moe_dist.config.dispatchers.base import DispatchSection
from moe_dist.config.dispatchers.kinds import AllToAllDispatchSection

if TYPE_CHECKING:  # the union is made at run time, so type checkers get the base class instead
    AnyDispatch = DispatchSection
else:
    AnyDispatch = kinds_in(dispatchers, DispatchSection, default="all_to_all")
LOSS_WORDS = 8192  # default of loss_words for a vocabulary of more than WHOLE_VOCABULARY words
WHOLE_VOCABULARY = 65_536
GROUPED_STEP = {"bf16": 8, "fp32": 4}  # elements per 16 bytes; in grouped GEMM, row strides are multiples of 16 bytes


class KernelsSection(Section):
    """Kernels that gather, weight and sum rows before and after the experts' matrix products. torch: operations of torch.
    triton: this project's Triton kernels, for CUDA. auto: triton on CUDA after a trial at the start, torch on a CPU."""

    kind: Literal["auto", "torch", "triton"] = "auto"
    fallback: bool = False
    """Use torch on all ranks if a rank of a run on CUDA cannot use Triton kernels, or if they fail their trial there. torch
    takes more memory, which the dry run then plans. false: the run ends with the reason."""


class ParallelSection(Section):
    """The distribution of the work over ranks, and the precision."""

    ep: Ranks = Field(default=1, description="Number of ranks over which the experts are sharded: an EP group.")
    edp: Ranks = Field(default=1, description="Number of EP groups; each holds all experts. The world size is ep x edp.")
    data: Literal["ddp", "fsdp2"] = "ddp"
    """ddp replicates the parameters that are not experts on all ranks. fsdp2 shards all parameters except routers."""
    fsdp_gather: Literal["micro_batch", "step"] = "micro_batch"
    """How often fsdp2 gathers parameters and sums gradients over ranks: once per micro_batch or once per step. step sends
    less, but each rank keeps the gathered parameters (in the compute data type) and their gradients (in fp32) in memory
    from the first micro-batch to the last."""
    recompute: Literal["none", "experts", "block"] = "none"
    """Activations that backward recomputes. experts: activations of the experts' FFNs, without a second exchange. block:
    activations of attention and MoE layers; this repeats the dispatch exchange, but not the routing."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Data type of the computation. Master weights and sums of gradients are always in fp32."""
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes CUDA if there is a GPU.")
    expert_pair_budget: PositiveInt | None = None
    """Largest number of (token, expert) pairs that a rank's experts compute at once. More pairs are computed in chunks,
    which backward recomputes. null: no bound."""
    expert_gemm: Literal["auto", "grouped", "loop"] = "auto"
    """Form of the experts' matrix products. grouped: torch's grouped GEMM. loop: a loop over experts. auto: grouped if the
    widths allow it and it is faster: on CUDA in bf16, and on a CPU with at least 16 experts of a group per rank."""
    kernels: KernelsSection = KernelsSection()
    """Kernels before and after the experts' matrix products."""
    compile: bool = False
    """Use torch.compile for norms, projections, dense and shared FFNs and the cross entropy. This fuses their operations,
    and costs a minute at the start. On CUDA, attention is always compiled."""
    loss_words: PositiveInt | None = None
    """Number of vocabulary words whose logits the loss computes at once, for the tokens of one sequence. If the vocabulary
    has more words, backward recomputes all logits (docs/parallelism.md). null: all words of a vocabulary of up to 65,536
    words, else 8,192."""
    max_receive_rows: PositiveInt | None = None
    """Largest number of rows that a rank may receive in one layer. More rows raise an error before the buffer is allocated.
    null: no bound; the largest possible number is (ep - 1) x the number of tokens of a micro-batch."""
    dispatch: AnyDispatch = Field(default_factory=AllToAllDispatchSection)
    """Exchange that sends rows to the ranks of their experts, and the results back."""
    two_batch_overlap: bool = False
    """Divide each training micro-batch into two halves, and exchange the rows of one half while the other half is computed.
    Needs an even train.micro_batch, and dispatch.kind=all_to_all (docs/parallelism.md)."""
    deterministic: bool = False
    """Make runs bit-identical on the same layout of ranks. On CUDA this uses slower kernels without atomic additions, and
    an operation without a deterministic kernel raises an error. Runs on CPUs are always bit-identical."""
    start_seconds: PositiveFloat = 1800.0
    """Seconds that a rank waits for missing ranks at the start of a run. Nodes start at different times, containers and
    imports may be slow, and rank 0 may wait 90 s for an earlier attempt to end. The log names missing ranks every 30 s."""
    timeout_seconds: PositiveFloat = Field(default=600.0, description="A collective that takes longer ends the run.")
    watchdog_seconds: PositiveFloat | None = None
    """Seconds after which the watchdog ends a run that hangs in a collective. Every rank writes its position, and a report
    names the rank for which the others wait. null: 0.8 x timeout_seconds, which is also the largest value."""

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
        """Checks that `compile`, `two_batch_overlap` and `expert_gemm: grouped` are compatible with the precision and the
        widths. Does not check which device this machine has."""
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
    """Yields a violation for each setting that cannot be combined with `parallel.two_batch_overlap`."""
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
    """The nodes on which the ranks of an expert group must run."""

    feature: Name | None = None
    """With Slurm: feature that a node must have (--constraint). With Ray, if labels is empty: value that a node's label
    `feature` must have. null: any node."""
    labels: dict[Label, Label] = Field(
        default_factory=dict, description="Ray: labels that the node must have, name and value."
    )
    own: bool = Field(default=False, description="Use whole nodes, on which no rank of another group runs.")


class PinnedGroupSection(Section):
    """The ranks and nodes of one expert group."""

    ranks: tuple[Count, ...] = ()
    """EP ranks that have the group's experts. If empty, the planner chooses the EP ranks."""
    node: NodeSection = Field(default_factory=NodeSection)
    """Nodes on which the group's ranks must run; by default all nodes."""


class InterleavedSection(Section):
    """The experts of every expert group are spread evenly over all ranks of an EP group."""

    policy: Literal["interleaved"] = "interleaved"


class PinnedSection(Section):
    """Each expert group has separate ranks. Groups that name no ranks share the other ranks in proportion to load."""

    policy: Literal["pinned"] = "pinned"
    groups: dict[Name, PinnedGroupSection] = Field(default_factory=dict, description="Ranks of each group, by name.")


class ExplicitSection(Section):
    """The configuration lists the experts of each rank. A rank may have any number of experts, or none."""

    policy: Literal["explicit"] = "explicit"
    slots: tuple[tuple[str, ...], ...] = Field(description="Experts of each rank of an EP group, as 'group/index'.")


PlacementSection = Annotated[InterleavedSection | PinnedSection | ExplicitSection, Field(discriminator="policy")]
