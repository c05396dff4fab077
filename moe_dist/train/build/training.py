"""Makes the model, optimizer and data loader from the configuration, together with the other files of this folder."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from moe_dist.checkpoint.collective_status import CollectiveStatus
from moe_dist.checkpoint.state import (
    CheckpointState,
    LocalShard,
    Part,
    RankLayout,
    TensorSpec,
    capture,
    moment_specs,
    trained_tensors,
)
from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.config.base.section import named
from moe_dist.config.parallel.section import AllToAllDispatchSection
from moe_dist.config.schema import Config
from moe_dist.data.loader import TrainLoader
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest
from moe_dist.model.compiled import compile_dense
from moe_dist.model.kernels import choice as dense_kernels
from moe_dist.model.layers import ModelArgs
from moe_dist.model.mixture_of_depths import DepthRouter
from moe_dist.model.transformer import Transformer
from moe_dist.moe.balance.controller import BiasController
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.experts.experts import choose_gemm
from moe_dist.moe.kernel_choice import choose_kernels
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.losses import StepLoad
from moe_dist.moe.routers.selection import SelectionScope
from moe_dist.moe.thresholds import ThresholdUpdater
from moe_dist.monitor.card_peaks import peak_tflops
from moe_dist.optim.optimizer import OptimizerContext, lr_at, split_parameters
from moe_dist.parallel.initialise import allocate, initialise
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.parallelize import ParallelModel, freeze_all_but, shard
from moe_dist.placement.parameter_names import ADAPTERS, ROUTERS, Role
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.flops import model_flops_per_token
from moe_dist.plan.policies import expert_groups, replicated_placement
from moe_dist.train.build.dealing import build_dealing
from moe_dist.train.build.dispatch import NodeGroups, dispatch_context
from moe_dist.train.build.moe_layers import (
    LayerParts,
    attention_adapters,
    build_balance,
    build_scopes,
    build_targets,
    depth_thresholds,
    make_layers,
)
from moe_dist.train.build.tuning import build_tuning
from moe_dist.train.objective.distillation import Distillation, Teacher, load_teacher, teacher_section
from moe_dist.train.objective.loss import AuxSettings, aux_at
from moe_dist.train.router_tuning.loader import MAKERS, SampleLoader
from moe_dist.train.router_tuning.samples import Samples
from moe_dist.train.router_tuning.tuning import RouterTuning, freeze_all_but_routers
from moe_dist.train.step.training_step import TrainingStep

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_args(config: Config, compute_dtype: torch.dtype) -> ModelArgs:
    """Copies the transformer's arguments from the configuration, because the package `model` does not import `config`."""
    section = config.model
    named = {each.name: getattr(section, each.name) for each in fields(ModelArgs) if hasattr(section, each.name)}
    named["head_dim"] = section.resolved_head_dim
    if (scaling := section.rope_scaling) is not None:
        named["rope_scaling"] = scaling.build()
    named["loss_words"] = config.parallel.loss_words_of(section.vocab_size)
    named["two_batch_overlap"] = config.parallel.two_batch_overlap
    return ModelArgs(**named, compute_dtype=compute_dtype, recompute_blocks=config.parallel.recompute == "block")


def build_model(config: Config, placement: ExpertPlacement, **parts: Any) -> Any:
    """Makes the model of the configured engine. Takes the arguments of `build_transformer`."""
    return named(config.engine.model)(config, placement, **parts)


def wiring(mesh: Mesh, comm_stats: CommStats) -> dict[str, Any]:
    """Returns the arguments of `build_transformer` that connect a model with the other ranks of `mesh`."""
    nodes = (mesh.inter_node, mesh.intra_node)
    groups: dict[str, Any] = {"ep_rank": mesh.ep_rank, "ep_group": mesh.ep, "node_groups": nodes}
    return {**groups, "comm_stats": comm_stats, "tracker": mesh.tracker}


def build_transformer(
    config: Config,
    placement: ExpertPlacement,
    *,
    ep_rank: int,
    ep_group: dist.ProcessGroup | None,
    node_groups: NodeGroups = (None, None),
    comm_stats: CommStats | None = None,
    tracker: CollectiveTracker | None = None,
    compute_dtype: torch.dtype | None = None,
    choice_scope: SelectionScope | None = None,
    depth_scope: SelectionScope | None = None,
    kernels: RowKernels = TORCH,
) -> Transformer:
    """Makes the transformer with this rank's experts on torch's default device (meta in a dry run and before sharding).

    Args:
        placement: Experts of each EP rank. Without an `ep_group` the model can run only if one rank has all experts.
        node_groups: Process group between nodes, and process group inside this node, for the hierarchical dispatcher.
        comm_stats: Counts the bytes and seconds of all layers' exchanges.
        compute_dtype: Replaces the dtype of `parallel.precision`; tests use float64.
        choice_scope: Ranks whose tokens compete for an expert in expert choice. With None only this rank's tokens compete.
        depth_scope: Ranks whose tokens compete in mixture-of-depths layers. With None only this rank's tokens compete.
        kernels: Functions that compute on token rows before and after the experts' matrix products.
    """
    section, stats = config.model, comm_stats or CommStats()
    dtype = compute_dtype or COMPUTE_DTYPES[config.parallel.precision]
    all_to_all = AllToAll(ep_group, stats, tracker)
    parts = LayerParts(config, placement, ep_rank, all_to_all, node_groups, choice_scope, kernels)

    def make_depths(layer: int) -> DepthRouter:
        assert section.mixture_of_depths is not None
        fields = section.mixture_of_depths.model_dump(exclude={"every", "first", "scope"})
        return DepthRouter(section.hidden_dim, selection_scope=depth_scope, name=f"layers.{layer}", **fields)

    return Transformer(
        model_args(config, dtype),
        make_layers(parts),
        make_depths,
        attention_adapters(config),
        section.attention.build,
    )


def build_for_inference(
    config: Config, placement: ExpertPlacement, device: torch.device, mesh: Mesh | None = None
) -> Transformer:
    """Makes the model in evaluation mode. The caller must load the uninitialised tensors. The layout of the training run
    does not matter. The ranks of an EP group of `mesh` share the experts; without `mesh` this rank has all experts."""
    ep, ep_rank, ep_group = (1, 0, None) if mesh is None else (mesh.ep_size, mesh.ep_rank, mesh.ep)
    alone = {"ep": ep, "edp": 1, "data": "ddp", "recompute": "none", "dispatch": AllToAllDispatchSection()}
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=alone)})
    with torch.device("meta"):
        model = build_model(config, placement, ep_rank=ep_rank, ep_group=ep_group)
    allocate(model, device)
    return model.eval()


def state_specs(config: Config) -> dict[str, TensorSpec]:
    """Returns the shape and dtype of each tensor in a checkpoint of the configured model, by logical name. The tensors are
    parameters, buffers, and the optimizer's moments of trained parameters. Allocates no memory for tensors."""
    everything = replicated_placement(expert_groups(config.model.moe))
    with torch.device("meta"):
        model = build_model(config, everything, ep_rank=0, ep_group=None)
    freeze(model, config)
    layout = RankLayout(everything)
    moments = moment_specs(model, layout, orthogonal=config.optimizer.orthogonal)
    return {**capture(model, None, layout, part=saved_part(config)).specs, **moments}


def freeze(model: Transformer, config: Config) -> None:
    """Disables the gradients of parameters that, by `router_tuning`, `train.only` or `train.frozen`, are not trained."""
    if config.router_tuning is not None:
        freeze_all_but_routers(model, config.router_tuning.chosen_layers(config.model.moe_layers))
    elif config.train.only is not None:
        routers = frozenset() if config.model.freezes_routers else ROUTERS
        trained = {
            "auxiliary_routers": {Role.AUXILIARY_ROUTER},
            "adapters": routers | ADAPTERS,
            "routers": {Role.ROUTER},
            "experts": {Role.EXPERT},
        }
        freeze_all_but(model, trained[config.train.only])
    elif config.train.frozen is not None:
        freeze_all_but(model, frozenset(Role) - ROUTERS)


def saved_part(config: Config) -> Part:
    """Returns which parameters checkpoints contain: only the trained ones if the run trains adapters, otherwise all."""
    return "trained" if config.train.only == "adapters" else "all"


def rank_layout(placement: ExpertPlacement, mesh: Mesh | None) -> RankLayout:
    """Returns the position of this rank among the ranks that share a checkpoint. Pass `mesh=None` for a single rank."""
    if mesh is None:
        return RankLayout(placement)
    return RankLayout(placement, mesh.rank, mesh.world_size, mesh.ep_rank, mesh.edp_rank, mesh.edp_size)


@dataclass(frozen=True)
class Training:
    """The model (wrapped for data parallelism), its optimizer, its controllers, and its training step."""

    parallel: ParallelModel
    optimizer: Optimizer
    step: TrainingStep
    dispatch: DispatchContext | None = None  # arguments for a new dispatcher when experts have moved
    balance: BiasController | None = None
    tuning: RouterTuning | None = None
    load: StepLoad | None = None

    def capture(self, layout: RankLayout, **options: Any) -> CheckpointState:
        """Returns the state of this rank's model and optimizer, as `moe_dist.checkpoint.state.capture` does."""
        return capture(self.parallel.model, self.optimizer, layout, **options)

    def trained_tensors(self, layout: RankLayout, *, gradients: bool) -> tuple[Mapping[str, LocalShard], Sequence[str]]:
        """See `moe_dist.checkpoint.state.trained_tensors`."""
        return trained_tensors(self.parallel.model, layout, gradients=gradients)

    @property
    def has_copies(self) -> bool:
        """Returns True if `capture` returns tensors that several ranks have computed independently."""
        return True

    def begin(self) -> str:
        """Loads a new run's first weights if the engine reads them from files. Returns a line to print, or ""."""
        return ""

    def loaded(self, state: CheckpointState) -> None:
        """Is called after a checkpoint has been loaded into the tensors of `state`, which `capture` returned."""

    def controllers(self) -> dict[str, BiasController | RouterTuning | StepLoad]:
        """Returns, by name, the controllers whose state is saved in checkpoints."""
        found = {"balance": self.balance, "router_tuning": self.tuning, "balance_loss": self.load}
        return {name: each for name, each in found.items() if each is not None}


class EngineContext(NamedTuple):
    """The arguments with which an engine is made."""

    config: Config
    manifest: Manifest
    placement: ExpertPlacement
    mesh: Mesh


@contextmanager
def own_engine(context: EngineContext) -> Iterator[Training]:
    """Makes model, optimizer and training step of `engine.kind=moe_dist`."""
    yield build_training(*context)


def build_training(config: Config, manifest: Manifest, placement: ExpertPlacement, mesh: Mesh) -> Training:
    """Builds the model on the meta device, shards it, initialises its weights, and wraps it for data parallelism. Then
    makes the optimizer and the training step.

    The model is sharded before memory is allocated for it, so no rank ever allocates the whole model.
    """
    comm_stats = CommStats()
    check_expert_gemm(config, mesh.device)
    choice_scope, depth_scope = build_scopes(config, mesh, comm_stats)
    kernels = row_kernels(config, mesh.device, mesh.checkpoint)
    with torch.device("meta"):
        model = build_model(
            config,
            placement,
            **wiring(mesh, comm_stats),
            choice_scope=choice_scope,
            depth_scope=depth_scope,
            kernels=kernels,
        )
    freeze(model, config)  # before sharding, because FSDP2 then reduces no gradients of frozen parameters
    if config.parallel.compile:
        compile_dense(model)
    elif kernels is not TORCH:  # not with torch.compile, which fuses these operations itself
        dense_kernels.use(model, dense_kernels.triton_kernels())
    if config.parallel.data == "fsdp2":
        shard(model, mesh, COMPUTE_DTYPES[config.parallel.precision])
    initialise(model, placement, ep_rank=mesh.ep_rank, device=mesh.device, seed=config.run.seed, std=config.model.init_std)
    parallel = ParallelModel(model, mesh, config.parallel.data, fsdp_gather=config.parallel.fsdp_gather)
    optimizer = build_optimizer(config, model)
    groups = group_of_modality(manifest, placement)
    whole = config.train.only is None  # if False, routers keep the thresholds of the loaded model
    tuning = build_tuning(config, manifest, parallel, groups)
    layers = model.moe_modules()
    balance = build_balance(config.model.moe, [layer.router for layer in layers], placement.groups, mesh.device)
    thresholds = (ThresholdUpdater.of(layers), depth_thresholds(model)) if whole else ()
    load = StepLoad(placement.groups, len(layers), mesh.device) if config.loss.balance.scope == "step" and layers else None
    distillation, taught = None, config.loss.distillation
    if taught is not None:
        status = CollectiveStatus(taught.teacher, mesh.checkpoint, mesh.tracker)
        read = partial(build_distillation, config, manifest, mesh.device)
        distillation = status.phase("load the teacher", read)  # the load fails either on all ranks or on none
    step = TrainingStep(
        parallel,
        optimizer,
        placement=placement,
        group_of_modality=groups,
        clip_norm=config.optimizer.clip_norm,
        comm_stats=comm_stats,
        controllers=[each for each in (balance, *thresholds, load) if each is not None],
        needs_global_batch_info=config.model.moe.router.needs_global_batch_info or config.model.largest_dropout > 0.0,
        tuning=tuning,
        distillation=distillation,
        load=load,
    )
    dispatch = context_on(mesh, config, placement, comm_stats, kernels)
    return Training(parallel, optimizer, step, dispatch, balance, tuning, load)


def context_on(
    mesh: Mesh, config: Config, placement: ExpertPlacement, comm_stats: CommStats, kernels: RowKernels = TORCH
) -> DispatchContext:
    """Returns the arguments of a dispatcher over the ranks of `mesh`."""
    wire, nodes = AllToAll(mesh.ep, comm_stats, mesh.tracker), (mesh.inter_node, mesh.intra_node)
    tokens = config.train.micro_batch * config.data.seq_len
    return dispatch_context(config.parallel, placement, wire, config.model.hidden_dim, nodes, kernels, tokens=tokens)


def build_distillation(config: Config, manifest: Manifest, device: torch.device) -> Distillation:
    """Makes the distillation term of the loss. Loads the teacher on this rank."""
    section = config.loss.distillation
    assert section is not None, "the caller checks the section"
    folder, model = teacher_section(section.teacher, config.model, manifest, seq_len=config.data.seq_len)
    placement = replicated_placement(expert_groups(model.moe))
    teacher = build_for_inference(config.model_copy(update={"model": model}), placement, device)
    load_teacher(teacher, folder, placement)
    of_modality = torch.tensor(group_of_modality(manifest, placement), device=device)
    return Distillation(Teacher(teacher, of_modality, divergence=section.divergence), weight=section.weight)


def build_optimizer(config: Config, model: Transformer) -> Optimizer:
    """Makes the optimizer of the model's trained parameters, after sharding."""
    section = config.optimizer
    groups = split_parameters(model, weight_decay=section.weight_decay, orthogonal=section.orthogonal)
    return section.build(OptimizerContext(groups, COMPUTE_DTYPES[config.parallel.precision]))


def check_expert_gemm(config: Config, device: torch.device) -> None:
    """Raises ConfigError if the run needs a grouped matrix product that this device lacks for the experts' shapes."""
    dtype, kind = COMPUTE_DTYPES[config.parallel.precision], config.parallel.expert_gemm
    if config.parallel.dispatch.static and device.type == "cuda":
        kind = "grouped"  # a loop over experts would need each expert's number of rows on the host
    for group in config.model.moe.groups.values():
        widths = (config.model.hidden_dim, group.ffn_dim)
        try:
            choose_gemm(kind, dtype=dtype, device=device, widths=widths, num_experts=group.num_experts)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def row_kernels(config: Config, device: torch.device, ranks: dist.ProcessGroup | None = None) -> RowKernels:
    """Returns the kernels that `parallel.kernels` chooses, the same on all `ranks` (a gloo group). If Triton kernels fail
    or are missing on a rank, all ranks get torch kernels; without `parallel.kernels.fallback` raises ConfigError."""
    chosen, dtype = config.parallel.kernels, COMPUTE_DTYPES[config.parallel.precision]
    kernels, reason = choose_kernels(chosen.kind, device=device, dtype=dtype)
    if kernels is not TORCH and chosen.kind == "auto" and not config.parallel.compile:
        reason = dense_kernels.why_not(dense_kernels.triton_kernels(), device, dtype)
    failed = torch.zeros(dist.get_world_size(ranks) if ranks else 1, dtype=torch.int64, device="cpu")
    failed[dist.get_rank(ranks) if ranks else 0] = reason is not None
    if ranks is not None:
        dist.all_reduce(failed, group=ranks)
    if not failed.any():
        return kernels
    reason = reason or f"rank {int(failed.argmax())} cannot use Triton kernels, and its log has the reason"
    if not chosen.fallback:
        raise ConfigError(
            f"parallel.kernels.kind={chosen.kind}: {reason}; set parallel.kernels.fallback=true or "
            "parallel.kernels.kind=torch to compute by torch, which takes more memory (docs/gpu.md)"
        )
    logger.warning("parallel.kernels.kind=%s takes torch: %s (docs/gpu.md)", chosen.kind, reason)
    return TORCH


def group_of_modality(manifest: Manifest, placement: ExpertPlacement) -> list[int]:
    """Returns, for each modality in the manifest's order, the index of its expert group."""
    index = {name: i for i, group in enumerate(placement.groups) for name in group.modalities}
    return [index[name] for name in manifest.modalities]


def build_loader(config: Config, manifest: Manifest, *, rank: int, world_size: int) -> TrainLoader | SampleLoader:
    """Makes the loader of one rank's training batches."""
    share: dict[str, int] = {
        "seed": config.run.seed,
        "global_batch": config.train.global_batch,
        "micro_batch": config.train.micro_batch,
        "rank": rank,
        "world_size": world_size,
    }
    if config.router_tuning is not None:
        return SampleLoader(Samples(config.router_tuning.data), MAKERS[config.router_tuning.objective](manifest), **share)
    data = config.data
    return TrainLoader(
        data.path,
        manifest,
        seq_len=data.seq_len,
        weights=data.weights,
        pack_window=data.pack_window,
        most_patches=data.most_patches,
        skip=data.skip,
        dealing=build_dealing(config, tuple(manifest.modalities)),
        **share,
    )


@dataclass(frozen=True)
class LoopSettings:
    """Functions and constants of the training loop, made from the configuration. `flops_per_token` returns the FLOPs per
    token of forward and backward. Its arguments map each group to its mean number of true experts per token, and to its
    fraction of all tokens."""

    config: Config
    placement: ExpertPlacement
    modalities: tuple[str, ...]
    baselines: Mapping[str, float]  # held-out losses of unigram and bigram models, in nats per token
    lr: Callable[[int], float]  # maps a step (0-based) to its learning rate
    aux: Callable[[int], AuxSettings]  # maps a step (0-based) to its settings of the auxiliary terms
    flops_per_token: Callable[[Mapping[str, float], Mapping[str, float]], float]
    peak_flops: float | None  # peak FLOPs per second, summed over all devices; None if unknown
    peak_source: str  # the configuration key or the card's name from which `peak_flops` comes
    active_target: Mapping[str, Callable[[int], float]]  # maps a group to a function, see `build_targets`


def loop_settings(config: Config, manifest: Manifest, placement: ExpertPlacement, card: str | None = None) -> LoopSettings:
    """Makes the settings of the training loop from the configuration. `card` is the name of the ranks' GPU."""
    optimizer, balance = config.optimizer, config.loss.balance
    peak, source = config.monitor.peak_tflops, "monitor.peak_tflops"
    if peak is None and card is not None and config.parallel.precision == "bf16":
        peak, source = peak_tflops(card), card
    names = [group.name for group in placement.groups]
    weights = tuple(balance.null_weight.get(name, 1.0) for name in names) if balance.null_weight else None
    return LoopSettings(
        config=config,
        placement=placement,
        modalities=tuple(manifest.modalities),
        baselines=manifest.baselines,
        lr=partial(lr_at, peak=optimizer.lr, total_steps=config.train.steps, **optimizer.schedule.model_dump()),
        aux=partial(aux_at, schedule=balance.schedule, kind=balance.kind, z=config.loss.z, null_weight_G=weights),
        flops_per_token=partial(model_flops_per_token, config=config),
        active_target=build_targets(config.model.moe, placement.groups),
        peak_flops=None if peak is None else peak * 1e12 * config.parallel.ep * config.parallel.edp,
        peak_source=source,
    )
