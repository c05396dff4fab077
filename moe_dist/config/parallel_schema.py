"""The schema of how ranks share work and where experts live: dispatch, parallel, placement. `schema` has the whole."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from moe_dist.config import dispatchers
from moe_dist.config.dispatchers.all_to_all import AllToAllDispatchSection
from moe_dist.config.dispatchers.base import DispatchSection
from moe_dist.config.kinds import kinds_in
from moe_dist.config.section import WATCHDOG_SHARE, Count, Label, Name, Ranks, Section, Violation, WholeConfig

if TYPE_CHECKING:  # type checkers see the type of the base
    AnyDispatch = DispatchSection
else:
    AnyDispatch = kinds_in(dispatchers, DispatchSection)
GROUPED_STEP = {"bf16": 8, "fp32": 4}  # elements in 16 bytes, the stride that grouped GEMM needs


class ParallelSection(Section):
    """How ranks share the work, and in what precision."""

    ep: Ranks = Field(default=1, description="Ranks over which the experts are sharded (an EP group).")
    edp: Ranks = Field(default=1, description="EP groups, each with a copy of all experts. World size is ep x edp.")
    data: Literal["ddp", "fsdp2"] = "ddp"
    """Replicate the dense parameters (ddp) or shard them (fsdp2)."""
    recompute: Literal["none", "experts", "block"] = "none"
    """Activations computed again in backward: none; experts (the FFN between the exchanges, which repeats no exchange);
    block (attention and MoE layers, which repeats the dispatch exchange, never the routing)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type; master weights and sums stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes CUDA where there is one.")
    expert_pair_budget: PositiveInt | None = None
    """(token, expert) pairs a rank's experts compute at once; beyond it they run in recomputed chunks."""
    expert_gemm: Literal["auto", "grouped", "loop"] = "auto"
    """The experts' products: torch's grouped GEMM or a loop over experts; auto takes grouped where it is faster: on CUDA in
    bf16, on CPU from 16 experts of a group on a rank; where the widths allow it."""
    max_receive_rows: PositiveInt | None = None
    """Bound of the rows a rank may receive in one layer, an error before the buffer is made; null bounds it by (ep - 1) x
    the micro-batch's tokens alone."""
    dispatch: AnyDispatch = Field(default_factory=AllToAllDispatchSection)
    """How rows travel to the ranks of their experts and back."""
    deterministic: bool = False
    """Repeat a run bit for bit on the same layout: on CUDA slower kernels instead of atomic additions, and an error at an
    operation that has no repeatable form. The CPU repeats without it."""
    timeout_seconds: PositiveFloat = Field(default=600.0, description="A collective that takes longer ends the run.")
    watchdog_seconds: PositiveFloat | None = None
    """A collective that takes longer makes every rank write where it is, then ends the run, naming the rank that the others
    wait for; at most, and by default, 0.8 x timeout_seconds."""
    check_exchanges: bool = False
    """Check every row of every exchange by checksum, naming layer, ranks and row where one was damaged; for debugging, its
    cost is in docs/parallelism.md."""

    @property
    def resolved_watchdog_seconds(self) -> float:
        return self.watchdog_seconds or WATCHDOG_SHARE * self.timeout_seconds

    def violations(self) -> Iterator[Violation]:
        if self.resolved_watchdog_seconds <= WATCHDOG_SHARE * self.timeout_seconds:
            return
        problem = (
            f"watchdog_seconds={self.watchdog_seconds:g} must be at most {WATCHDOG_SHARE:g} x timeout_seconds="
            f"{self.timeout_seconds:g}, since the ranks need time for their reports; lower it, or raise timeout_seconds"
        )
        yield Violation(("watchdog_seconds", "timeout_seconds"), problem)

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        """Checks `expert_gemm: grouped` against types and widths, without looking at a device."""
        if self.expert_gemm != "grouped":
            return
        if self.device == "cuda" and self.precision != "bf16":
            problem = (
                f"parallel.expert_gemm=grouped: on CUDA torch has a grouped kernel for bf16 only, not for "
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

    @field_validator("dispatch", mode="before")
    @classmethod
    def _per_rank_unless_said(cls, value: Any) -> Any:
        """`parallel.dispatch.overlap=true` alone means the default kind, which has that key."""
        return {"kind": "all_to_all", **value} if isinstance(value, dict) and "kind" not in value else value


class NodeSection(Section):
    """The nodes that a group's ranks belong on."""

    feature: Name | None = None
    """Feature of the node under Slurm (--constraint); under Ray, where labels are empty, the label `feature` with this
    value. null: any node."""
    labels: dict[Label, Label] = Field(default_factory=dict, description="Labels of the node under Ray, name and value.")
    own: bool = Field(default=False, description="Whole nodes of the group's own: no rank of another group goes there.")


class PinnedGroupSection(Section):
    """Where one group lives."""

    ranks: tuple[Count, ...] = Field(default=(), description="Positions in the EP group that hold this group's experts.")
    node: NodeSection = Field(default_factory=NodeSection)
    """The nodes that the group's ranks belong on; by default any."""


class InterleavedSection(Section):
    """Every group is spread over all ranks of an EP group."""

    policy: Literal["interleaved"] = "interleaved"


class PinnedSection(Section):
    """Each group's experts live on ranks of their own; where `ranks` is not given, the planner divides them by load."""

    policy: Literal["pinned"] = "pinned"
    groups: dict[Name, PinnedGroupSection] = Field(default_factory=dict, description="Ranks of each group, by name.")


class ExplicitSection(Section):
    """The experts of each rank written out: any number a rank, none as well."""

    policy: Literal["explicit"] = "explicit"
    slots: tuple[tuple[str, ...], ...] = Field(description="For each rank of an EP group its experts, as 'group/index'.")


PlacementSection = Annotated[InterleavedSection | PinnedSection | ExplicitSection, Field(discriminator="policy")]
