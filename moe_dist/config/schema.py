"""Defines the schema of a run's configuration, with each key's type, meaning and default. Sections are frozen and strict.

Each run saves its resolved configuration. `violations` checks rules between keys of one section, and `violations_in` checks
rules between sections. `moe_dist.plan.preflight` reports all violated rules at once.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config import engines, optimizers, sinks
from moe_dist.config.base.kinds import kinds_in
from moe_dist.config.base.section import (
    UNIX_GROUP_PATTERN,
    Count,
    GroupName,
    Name,
    NonNegative,
    PathText,
    PositiveInt,
    Section,
    Share,
    Violation,
    WholeConfig,
    unknown_name,
    unordered,
)
from moe_dist.config.engines.base import EngineSection
from moe_dist.config.engines.own import OwnEngineSection
from moe_dist.config.experts.lora import adapter_violations
from moe_dist.config.init_rules import init_violations
from moe_dist.config.model_schema import ModelSection
from moe_dist.config.optimizers.base import OptimizerSection
from moe_dist.config.parallel.section import InterleavedSection, ParallelSection, PlacementSection
from moe_dist.config.rank_balance_schema import RankBalanceSection
from moe_dist.config.sinks.base import SinkSection
from moe_dist.config.sinks.kinds import ConsoleSinkSection, JsonlSinkSection, TensorBoardSinkSection
from moe_dist.config.stored_format import FORMAT
from moe_dist.config.trace_schema import ComputeMapSection, ProfileSection, TraceSection, needs_chosen_experts
from moe_dist.config.tuning_schema import RouterTuningSection


class RunSection(Section):
    """The name, folder, seed and initial weights of the run."""

    name: Name = Field(description="Name of the run; its folder is <root>/<name>. Letters, digits, '.', '_' and '-'.")
    root: PathText = Field(default="runs", description="Folder that holds all runs.")
    seed: Count = Field(default=0, description="Seed of the initial weights, the data order and every other random draw.")
    group: Annotated[str, Field(pattern=UNIX_GROUP_PATTERN)] | None = None
    """Unix group that owns the run folder and, through the folder's setgid bit, every file in it. The umask sets the rights
    of the group's members. null: the group is not changed."""
    init_from: PathText | None = None
    """Checkpoint or run folder from which a new run loads the weights whose names and shapes fit. A resumed run ignores
    this key."""
    init_rules: tuple[Literal["copy_nulls", "upcycle", "split", "adapt"], ...] = ()
    """Changes to the weights of init_from. copy_nulls copies a true expert's router row to each null expert, so that a
    trained top-k model starts unchanged (AdaMoE). upcycle copies a dense FFN, or the only expert of a group, into every
    expert of the group. split divides a dense FFN among the experts of the group. adapt adds new adapters to the unchanged
    model (train.only=adapters)."""
    keep_position: bool = False
    """With init_from: continue in the data at that checkpoint's position. Needs the same data, data section and seed as in
    the checkpoint. Steps and learning rate still start at the beginning."""

    def violations(self) -> Iterator[Violation]:
        if self.init_from is None and self.keep_position:
            problem = "keep_position=true: needs the position of a checkpoint; set init_from, or keep_position=false"
            yield Violation(("keep_position", "init_from"), problem)

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from init_violations(config)


class DataSection(Section):
    """The prepared data set, and the way in which its documents are packed into sequences."""

    path: PathText = Field(description="Folder of a prepared data set: manifest.json with .bin and .idx files.")
    seq_len: PositiveInt = Field(description="Tokens of a packed training sequence.")
    weights: dict[Name, Annotated[float, Field(gt=0, le=1e9)]] = Field(default_factory=dict)
    """Relative number of sequences from each source of the manifest. Empty: in proportion to the sources' tokens."""
    pack_window: PositiveInt = 512
    """Number of documents that are packed into sequences at a time. A larger window needs less padding."""
    most_patches: PositiveInt | None = None
    """Patches of pictures in a sequence, whose number bounds the encoder's memory and time. null: any number."""
    skip: tuple[tuple[Count, Count], ...] = ()
    """Pairs [first, last] of numbers of sequences in the training stream, counted from 0, that the run leaves out. Traces
    and the error of a diverged run name the numbers of sequences."""

    def violations(self) -> Iterator[Violation]:
        ends = [-1, *(end for pair in self.skip for end in pair)]
        rising = all(before < first for before, first in zip(ends[::2], ends[1::2], strict=False))
        if not rising or any(first > last for first, last in self.skip):
            pairs = [list(pair) for pair in self.skip]
            problem = f"skip={pairs}: each pair is [first, last] and begins behind the pair before it; put them in order"
            yield Violation(("skip",), problem)

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        if self.skip and config.router_tuning is not None:
            problem = "data.skip: router tuning trains on samples, not on sequences; set it to []"
            yield Violation(("data.skip", "router_tuning"), problem)
        longest = config.model.max_seq_len
        if self.seq_len > longest:
            problem = (
                f"data.seq_len={self.seq_len}: longer than model.max_seq_len={longest}; lower it, or raise max_seq_len"
            )
            yield Violation(("data.seq_len", "model.max_seq_len"), problem)


class BalanceSection(Section):
    """The load-balance loss."""

    kind: Literal["null_averaged", "vanilla", "null_split", "weighted"] = "null_averaged"
    """null_averaged: each null expert counts with the mean load of its group's null experts (AdaMoE). vanilla: each null
    expert counts with its own load. null_split: balances only the whole of true experts with the whole of other columns
    (ZEDA). weighted: each null, identity and constant expert counts with its own load and the weight null_weight
    (MoE++)."""
    scope: Literal["micro_batch", "step"] = "step"
    """Tokens that give loads and mean probabilities. step: probabilities of the whole step, and loads of the previous step,
    so that the loss does not depend on micro-batches and ranks. micro_batch: loads and probabilities of one micro-batch."""
    null_weight: dict[GroupName, PositiveFloat] = Field(default_factory=dict)
    """For each group, target load of a null expert divided by target load of a true expert (w). The default for a group is
    1. A balanced router takes k n / (n + m w) true experts per token."""
    schedule: tuple[tuple[Count, NonNegative], ...] = ((0, 0.02),)
    """Pairs [first step, coefficient]. A coefficient is used until the first step of the next pair."""

    def violations(self) -> Iterator[Violation]:
        yield from unordered(self.schedule)
        if self.null_weight and self.kind == "vanilla":
            problem = "null_weight: kind=vanilla gives every null expert its own load; take null_averaged or null_split"
            yield Violation(("null_weight", "kind"), problem)

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        where = "loss.balance.null_weight"
        for name in self.null_weight:
            if problem := unknown_name("group", name, config.model.moe.groups):
                yield Violation((where, "model.moe.groups"), f"{where}.{name}: {problem}")


class DistillationSection(Section):
    """Distillation: train the model to predict a teacher's distribution of the next token."""

    teacher: PathText
    """Checkpoint or run folder of the teacher. Every rank has a frozen copy of the whole teacher."""
    weight: Share = 1.0
    """Weight of the KL divergence from the teacher in the loss. Cross entropy has the weight 1 - this value."""
    divergence: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher || model). reverse: KL(model || teacher)."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        if config.router_tuning is not None:
            problem = "loss.distillation: router tuning trains on samples, which have no teacher; leave one of the two out"
            yield Violation(("loss.distillation", "router_tuning"), problem)


class LossSection(Section):
    """The loss: cross entropy and the terms that are added to it."""

    balance: BalanceSection = Field(
        default_factory=BalanceSection, description="Load-balance loss of each layer and group."
    )
    z: NonNegative = 0.0
    """Coefficient of the router z-loss: the mean of the squared log-sum-exp of the router's logits."""
    distillation: DistillationSection | None = None
    """Distillation from a teacher (docs/adapt.md). null: no distillation."""


class TrainSection(Section):
    """The steps, the batches and the trained parameters."""

    steps: PositiveInt = Field(description="Optimizer steps of the whole run.")
    global_batch: PositiveInt = Field(description="Sequences per step, over all ranks and micro-batches.")
    micro_batch: PositiveInt = Field(description="Sequences in a micro-batch: a rank computes them at once.")
    max_skipped_in_a_row: PositiveInt = 10
    """Number of consecutive skipped steps after which the run ends with exit code 70. A step is skipped if its gradients
    are not finite. If the last step is skipped, the run ends in the same way."""
    only: Literal["auxiliary_routers", "adapters", "routers", "experts"] | None = None
    """Train only these parameters. All others are loaded from run.init_from or model.folder, and frozen. auxiliary_routers:
    the second stage of expert choice. adapters: LoRA adapters, and routers of LoRA experts. routers: router tuning (section
    router_tuning), which engine.kind=transformers does not need. experts: routed experts. null: all parameters."""

    frozen: Literal["routers"] | None = None
    """Freeze these parameters, loaded from run.init_from, and train all others. routers: the rows of the routers; load
    controllers still change the selection biases. null: all parameters are trained."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from adapter_violations(config)
        untrained = config.run.init_from is None and config.model.folder is None
        if self.frozen is not None and (self.only is not None or untrained):
            problem = (
                f"train.frozen={self.frozen}: train.only={self.only} says already what is trained; leave one of the two out"
                if self.only is not None
                else f"train.frozen={self.frozen}: run.init_from=null leaves routers untrained; set it, or frozen to null"
            )
            yield Violation(("train.frozen", "train.only" if self.only else "run.init_from"), problem)
        if self.only == "routers" and config.router_tuning is None and not config.engine.hosts:
            problem = "train.only=routers: needs the section router_tuning; add it, or set train.only to null"
            yield Violation(("train.only", "router_tuning"), problem)
        elif self.only in ("routers", "experts") and config.router_tuning is None and untrained:
            problem = (
                f"train.only={self.only}: all other weights are frozen, and run.init_from=null leaves them untrained; set "
                "run.init_from, or model.folder with engine.kind=transformers"
            )
            yield Violation(("train.only", "run.init_from"), problem)
        if self.only == "experts" and (config.loss.z or any(each for _, each in config.loss.balance.schedule)):
            problem = (
                "train.only=experts: loss.balance and loss.z train routers, which are frozen; set "
                "loss.balance.schedule=[[0, 0.0]] and loss.z=0.0"
            )
            yield Violation(("train.only", "loss.balance.schedule", "loss.z"), problem)
        ranks = config.engine.data_ranks(config.parallel)
        each = self.micro_batch * ranks
        if self.global_batch % each:
            below = self.global_batch // each * each
            near = f"{below} or {below + each}" if below else str(each)
            problem = (
                f"train.global_batch={self.global_batch}: must be a multiple of train.micro_batch={self.micro_batch} x "
                f"{ranks} ranks ({config.engine.data_ranks_text()}) = {each}; take {near}, or another micro-batch or "
                "number of ranks"
            )
            yield Violation(("train.global_batch", "train.micro_batch", "parallel.ep", "parallel.edp"), problem)


CheckName = Literal["count_models", "experts_matter", "no_dead_expert", "few_drops", "null_fraction", "no_step_skipped"]


class EvaluationSection(Section):
    """The evaluation on held-out sequences."""

    every: PositiveInt = Field(description="Steps between held-out evaluations. The last step is always evaluated.")
    sequences: PositiveInt = Field(default=128, description="Held-out sequences of each source in one evaluation.")
    final_sequences: PositiveInt = 512
    """Number of held-out sequences of each source in the last evaluation."""
    calibration: Count = 4
    """Number of micro-batches per rank with which an evaluation calibrates the thresholds of router.causal=threshold and
    mixture_of_depths.causal=threshold. They are the last training micro-batches. With the calibrated thresholds, an expert
    or layer takes as many of their tokens as in training. 0: no calibration."""
    balance_efficiency: bool = True
    """Measure the throughput with real routing, divided by the throughput with even loads. Not measured with LoRA experts,
    because every rank has all of them."""
    ablate_experts: bool = True
    """In the last evaluation, also measure the held-out loss with the experts' outputs set to zero."""
    checks: tuple[CheckName, ...] = ()
    """Checks of the finished run, shown as a table of pass and FAIL. count_models: the held-out loss is below that of
    unigram and bigram models. experts_matter: the held-out loss rises without experts. no_step_skipped: no step was
    skipped. no_dead_expert, few_drops (a capacity drops less than 10 % of each layer's (token, expert) pairs) and
    null_fraction check the routing of the last 100 steps."""


class CheckpointSection(Section):
    """The checkpoints of the whole training state."""

    every: PositiveInt = Field(default=500, description="Steps between checkpoints. The last step is always saved.")
    keep: PositiveInt = Field(default=2, description="Number of checkpoints that are kept; older ones are deleted.")
    asynchronous: bool = True
    """Write checkpoints while training continues. Needs host memory for a copy of the tensors that a rank saves."""


if TYPE_CHECKING:  # the union is made at run time, so type checkers get the base class instead
    AnyEngine = EngineSection
    AnyOptimizer = OptimizerSection
    AnySink = SinkSection
else:
    AnyEngine = kinds_in(engines, EngineSection, default="moe_dist")
    AnyOptimizer = kinds_in(optimizers, OptimizerSection, default="adamw")
    AnySink = kinds_in(sinks, SinkSection)


class MonitorSection(Section):
    """The records and measurements of a run."""

    sinks: tuple[AnySink, ...] = (ConsoleSinkSection(), JsonlSinkSection(), TensorBoardSinkSection())
    """Destinations of the records. The JSONL file contains all values that the other sinks show."""
    device_seconds: PositiveFloat = 5.0
    """Seconds between two measurements of the GPU (NVML) and the host (psutil)."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one device in the compute precision, for perf/mfu. null: the known bf16 rate of a GPU with this name
    (moe_dist/monitor/card_peaks.py); perf/mfu is not reported for other GPUs, fp32 and CPUs."""
    profile: ProfileSection | None = Field(default=None, description="Profile some steps. null: no profile.")
    trace: TraceSection | None = Field(default=None, description="Trace each token's experts. null: no trace.")
    cost_table: bool = False
    """At the end, show how many rows and bytes the last 100 steps sent. Also show how many rows and bytes other placements
    and dispatchers would have sent for the same choices."""
    compute_map: ComputeMapSection | None = Field(default=None, description="Map of experts per token. null: no map.")
    compare_copies_every: PositiveInt | None = 100
    """Steps between two comparisons of the weights, moments and buffers that several ranks hold. A difference ends the run.
    Copies are also compared before each save. null: never."""
    most_picture_loss: Share | None = None
    """Share of the loss, in nats, that labels of pictures may have. A hint says when it is larger. null: any share."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        if not self.cost_table:
            return
        yield from needs_chosen_experts("monitor.cost_table", config, off="false")
        if config.model.moe.experts.replicated:
            problem = "monitor.cost_table: every rank holds all LoRA experts, so nothing is sent; set it to false"
            yield Violation(("monitor.cost_table", "model.moe.experts.kind"), problem)


class Config(Section):
    """The configuration of a whole run."""

    format: Literal[1] = Field(default=FORMAT, description="Number of the format of this configuration.")
    run: RunSection
    model: ModelSection
    data: DataSection
    train: TrainSection
    optimizer: AnyOptimizer
    loss: LossSection = Field(default_factory=LossSection)
    router_tuning: RouterTuningSection | None = None
    """Router tuning (RoMA). null: router tuning is off."""
    engine: AnyEngine = Field(default_factory=OwnEngineSection)
    """The engine that computes the training steps: this project's own, or Megatron-Core."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    placement: PlacementSection = Field(default_factory=InterleavedSection)
    rank_balance: RankBalanceSection = Field(default_factory=RankBalanceSection)
    evaluation: EvaluationSection
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    monitor: MonitorSection = Field(default_factory=MonitorSection)

    @property
    def even_active(self) -> dict[str, float]:
        """Maps expert groups to the expected number of true experts per token. This is a controller's target or, without a
        controller, k n / (n + m w), which minimises a balance loss with null weight w (k = top_k, n true and m null
        experts). Groups without target and null weight are omitted."""
        balance, found = self.loss.balance, {}
        for name, weight in balance.null_weight.items():
            group = self.model.moe.groups[name]
            weighted = group.num_null + (group.num_zero_computation if balance.kind != "null_averaged" else 0)
            rest = group.num_zero_computation if balance.kind == "null_averaged" else 0
            found[name] = group.top_k * group.num_experts / (group.num_experts + weighted * weight + rest)
        return found | self.model.moe.active_targets


# These sections and keys may change when a run is resumed. All other keys (of model, data, optimisation) must not change.
MAY_CHANGE_ON_RESUME: tuple[str, ...] = (
    "train.steps",
    "train.micro_batch",
    "train.max_skipped_in_a_row",
    "optimizer.lr",
    "optimizer.schedule",
    "optimizer.clip_norm",
    "engine",
    "parallel",
    "placement",
    "rank_balance",
    "evaluation",
    "checkpoint",
    "monitor",
    "run.root",
    "run.group",
    "model.folder",  # a run reads its weights at the start only
    "data.path",  # the folder may move, because digests identify its content (formats/split_files.py)
    "data.skip",  # may change only for sequences that the run has not yet reached (train/start/resume.py)
    "router_tuning.data",  # the folder may move, like data.path
)
