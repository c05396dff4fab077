"""The schema of a run: frozen, strict and complete. Every key has a type, a meaning, and where sensible a default.

The resolved configuration is saved with each run. Each section checks only itself here. Relations between sections (experts
and ranks, vocabulary and data) are checked by `moe_dist.plan.preflight`, which sees all sections.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moe_dist.config import sinks
from moe_dist.config.kinds import kinds_in
from moe_dist.config.model_schema import ModelSection
from moe_dist.config.parallel_schema import InterleavedSection, ParallelSection, PlacementSection
from moe_dist.config.section import (
    UNIX_GROUP_PATTERN,
    Count,
    Decay,
    Fraction,
    GroupName,
    Name,
    NonNegative,
    PathText,
    Section,
    Violation,
    WholeConfig,
)
from moe_dist.config.sinks.base import SinkSection
from moe_dist.config.sinks.console import ConsoleSinkSection
from moe_dist.config.sinks.jsonl import JsonlSinkSection
from moe_dist.config.sinks.tensorboard import TensorBoardSinkSection
from moe_dist.config.tuning_schema import RouterTuningSection


class RunSection(Section):
    """Name, place and seed of the run."""

    name: Name = Field(description="Name of the run; its folder is <root>/<name>. Letters, digits, '.', '_' and '-'.")
    root: PathText = Field(default="runs", description="Folder that holds all runs.")
    seed: Count = Field(default=0, description="Seed of initial weights, data order and every other random draw.")
    group: Annotated[str, Field(pattern=UNIX_GROUP_PATTERN)] | None = None
    """Unix group that is given the run folder, and by its setgid bit all that is made in it; null leaves both as the system
    makes them. What its members may do is the umask's to say."""
    init_from: PathText | None = None
    """Checkpoint (or run folder) whose weights a new run begins with, as far as names and shapes fit; a run that goes on
    does not look at it."""
    init_rules: tuple[Literal["copy_nulls", "upcycle", "adapt"], ...] = ()
    """What else is made of the weights of init_from: copy_nulls gives each null expert the router row of a true one, so
    that a trained top-k model begins as it is (AdaMoE); upcycle copies a dense FFN, or a group's one expert, into every
    expert of the group; adapt puts new adapters on that model, which stays as it is (train.only=adapters)."""
    keep_position: bool = False
    """With init_from, go on in the data where that checkpoint stands instead of at its beginning; needs the same data, data
    section and seed. Steps and learning rate begin anew."""

    def violations(self) -> Iterator[Violation]:
        if self.init_from is not None or not self.keep_position:
            return
        problem = (
            "keep_position=true: there is no init_from whose position could be kept; name a checkpoint in init_from, or "
            "set keep_position to false"
        )
        yield Violation(("keep_position", "init_from"), problem)


class DataSection(Section):
    """Which prepared data set, and how it becomes sequences."""

    path: PathText = Field(description="Folder of a prepared data set: manifest.json with .bin/.idx beside it.")
    seq_len: PositiveInt = Field(description="Tokens of a packed training sequence.")
    weights: dict[Name, PositiveFloat] = Field(default_factory=dict)
    """Share of sequences from each source of the manifest; empty means in proportion to their tokens."""
    pack_window: PositiveInt = Field(default=512, description="Documents among which the packer looks for a best fit.")

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        if self.seq_len <= config.model.max_seq_len:
            return
        problem = (
            f"data.seq_len={self.seq_len}: longer than model.max_seq_len={config.model.max_seq_len}; shorten it, or make "
            "the model for longer sequences"
        )
        yield Violation(("data.seq_len", "model.max_seq_len"), problem)


class ConstantSchedule(Section):
    """Linear warm-up, then constant."""

    kind: Literal["constant"] = "constant"
    warmup_steps: Count = Field(default=0, description="Steps of linear warm-up from 0.")


class CosineSchedule(Section):
    """Linear warm-up, then half a cosine down to min_ratio at the last step."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: Count = Field(default=0, description="Steps of linear warm-up from 0.")
    min_ratio: Fraction = Field(default=0.1, description="Last learning rate over the peak.")


class WsdSchedule(Section):
    """Warm-up, stable, decay: constant until the last decay_steps, then linear down to min_ratio."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: Count = Field(default=0, description="Steps of linear warm-up from 0.")
    decay_steps: PositiveInt = Field(description="Steps of the final decay.")
    min_ratio: Fraction = Field(default=0.0, description="Last learning rate over the peak.")


ScheduleSection = Annotated[ConstantSchedule | CosineSchedule | WsdSchedule, Field(discriminator="kind")]


class OptimizerSection(Section):
    """AdamW, its schedule and the bound of the gradient norm."""

    kind: Literal["adamw"] = "adamw"
    backend: Literal["auto", "torch", "apex"] = "auto"
    """auto takes NVIDIA Apex's FusedAdam where it is installed, else torch's fused AdamW."""
    lr: PositiveFloat = Field(description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), description="AdamW's decay rates of the moments.")
    eps: PositiveFloat = Field(default=1e-8, description="AdamW's epsilon.")
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay; norms, embeddings and routers get none."""
    clip_norm: PositiveFloat | None = Field(default=1.0, description="Bound of the global gradient norm; null for none.")
    schedule: ScheduleSection = Field(default_factory=lambda: ConstantSchedule(), description="Learning rate over steps.")


class BalanceSection(Section):
    """Load-balance loss."""

    kind: Literal["null_averaged", "vanilla", "null_split"] = "null_averaged"
    """Null experts share one averaged load (AdaMoE), or each has its own; or nothing but the split between true experts and
    all others is regulated (ZEDA)."""
    null_weight: dict[GroupName, PositiveFloat] = Field(default_factory=dict)
    """By group, the load that a null expert is to carry over that of a true one; 1 where it is not named. Even is then k n
    / (n + m w) true experts a token."""
    schedule: tuple[tuple[Count, NonNegative], ...] = ((0, 0.02),)
    """[first step, coefficient] pairs; each holds until the next one's first step."""

    def violations(self) -> Iterator[Violation]:
        starts = [start for start, _ in self.schedule]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            yield Violation(("schedule",), f"schedule must start at step 0 and rise, got first steps {starts}")
        if self.null_weight and self.kind == "vanilla":
            problem = "null_weight: kind=vanilla gives every null expert its own load; take null_averaged or null_split"
            yield Violation(("null_weight", "kind"), problem)


class LossSection(Section):
    """Auxiliary losses beside cross entropy."""

    balance: BalanceSection = Field(default_factory=BalanceSection, description="Load-balance loss, per layer and group.")
    z: NonNegative = 0.0
    """Coefficient of the router z-loss (mean squared log-sum-exp of its logits)."""


class TrainSection(Section):
    """Steps and batches."""

    steps: PositiveInt = Field(description="Optimizer steps of the whole run.")
    global_batch: PositiveInt = Field(description="Sequences a step, over all ranks and micro-batches.")
    micro_batch: PositiveInt = Field(description="Sequences a rank computes at once.")
    max_skipped_in_a_row: PositiveInt = Field(default=10, description="Non-finite steps in a row that end the run with 70.")
    only: Literal["auxiliary_routers", "adapters", "routers"] | None = None
    """Train these parameters alone and freeze all others, which run.init_from brings: auxiliary_routers is the second stage
    of expert choice; adapters are LoRA and the routers; routers is router tuning (section router_tuning). null trains
    all."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        ranks = config.parallel.ep * config.parallel.edp
        each = self.micro_batch * ranks
        if self.global_batch % each == 0:
            return
        below = self.global_batch // each * each
        near = f"{below} or {below + each}" if below else str(each)
        problem = (
            f"train.global_batch={self.global_batch}: must be a multiple of train.micro_batch={self.micro_batch} x "
            f"{ranks} ranks (parallel.ep x parallel.edp) = {each}; take {near}, or another micro-batch or number of ranks"
        )
        yield Violation(("train.global_batch", "train.micro_batch", "parallel.ep", "parallel.edp"), problem)


CheckName = Literal["count_models", "experts_matter", "no_dead_expert", "null_fraction", "no_step_skipped"]


class EvaluationSection(Section):
    """Held-out evaluation."""

    every: PositiveInt = Field(description="Steps between held-out evaluations; there is always one at the end.")
    sequences: PositiveInt = Field(default=128, description="Held-out sequences of each source in one evaluation.")
    final_sequences: PositiveInt = 512
    """Held-out sequences of each source in the last evaluation."""
    calibration: Count = 4
    """Of router.causal=threshold and mixture_of_depths.causal=threshold: before each evaluation, thresholds are set so that
    the last training micro-batches of each rank, so many, give each expert, or layer of depths, as many tokens as it takes
    of them in training; 0 leaves the running means as they are."""
    balance_efficiency: bool = True
    """Measure throughput with real against evenly spread routing; LoRA experts, which every rank holds, are left out."""
    ablate_experts: bool = True
    """At the end, measure held-out loss with the experts' output zeroed."""
    checks: tuple[CheckName, ...] = ()
    """What the finished run is checked against, shown as a table of pass and FAIL: count_models compares held-out losses
    with count models of the training tokens, experts_matter the losses with and without experts; no_dead_expert and
    null_fraction look at the routing of the last 100 steps; no_step_skipped counts steps that were not finite."""


class CheckpointSection(Section):
    """When the state is saved, and what is kept."""

    every: PositiveInt = Field(default=500, description="Steps between checkpoints; there is always one at the end.")
    keep: PositiveInt = Field(default=2, description="Checkpoints kept; older ones are removed.")
    asynchronous: bool = True
    """Write checkpoints while the training goes on; takes host memory for what a rank writes."""


if TYPE_CHECKING:  # type checkers see the type of the base
    AnySink = SinkSection
else:
    AnySink = kinds_in(sinks, SinkSection)


class MonitorSection(Section):
    """What is shown, and where."""

    sinks: tuple[AnySink, ...] = (ConsoleSinkSection(), JsonlSinkSection(), TensorBoardSinkSection())
    """Where records go; metrics.jsonl is the source of all."""
    device_seconds: PositiveFloat = 5.0
    """Seconds between readings of GPU (NVML) and host (psutil)."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one device at the compute type, for perf/mfu; null leaves it out."""


class Config(Section):
    """A whole run."""

    run: RunSection
    model: ModelSection
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection
    loss: LossSection = Field(default_factory=LossSection)
    router_tuning: RouterTuningSection | None = None
    """Router tuning (RoMA): its samples, layers, neighbours and weight; null for none."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    placement: PlacementSection = Field(default_factory=InterleavedSection)
    evaluation: EvaluationSection
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    monitor: MonitorSection = Field(default_factory=MonitorSection)


# Keys (a section, or one key of it) that may differ on resume; those of model, data and optimisation may not.
MAY_CHANGE_ON_RESUME: tuple[str, ...] = (
    "train.steps",
    "train.micro_batch",
    "train.max_skipped_in_a_row",
    "parallel",
    "placement",
    "evaluation",
    "checkpoint",
    "monitor",
    "run.root",
    "run.group",
    "data.path",  # the same data in another place: digests check the content (config/data_digest.py)
    "router_tuning.data",  # likewise
)
