"""Makes the model, optimizer and training step of the Megatron-Core engine (engine.kind=megatron)."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, CheckpointState, LocalShard, RankLayout
from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.config.schema import Config
from moe_dist.formats.manifest import Manifest
from moe_dist.megatron.cpu_trial import megatron_on_cpu
from moe_dist.megatron.process_groups import model_parallel, process_groups
from moe_dist.moe.routers.selection import SelectionScope
from moe_dist.optim.optimizer import MOMENTS, NO_DECAY
from moe_dist.parallel.initialise import initial_value
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.parameter_names import role_of_name
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.build.dispatch import dispatch_context
from moe_dist.train.build.moe_layers import build_balance, build_router, build_thresholds, router_context
from moe_dist.train.build.training import (
    EngineContext,
    Training,
    check_expert_gemm,
    group_of_modality,
    model_args,
    state_specs,
)


@dataclass(frozen=True)
class MegatronTraining(Training):
    """Megatron-Core's model and optimizer. Checkpoints store their tensors under the logical names that all engines use."""

    state: Any = None  # a `GptState`
    config: Config | None = None

    def capture(self, layout: RankLayout, **options: Any) -> CheckpointState:
        """Returns this rank's state, as `Training.capture` does. Collective if engine.distributed_optimizer is set."""
        assert self.config is not None
        mesh = self.parallel.mesh
        layout = RankLayout(layout.placement, mesh.rank, mesh.world_size, mesh.ep_rank)
        held, specs = self.state.held(), state_specs(self.config)
        if strange := held.keys() - specs.keys():
            raise AssertionError(f"not of this model: {sorted(strange)[:4]}")
        values, of_rank = options.get("values") or {}, options.get("rank_values") or {}
        return CheckpointState(held, specs, layout, self.state.counted, values, of_rank)

    def trained_tensors(self, layout: RankLayout, *, gradients: bool) -> tuple[Mapping[str, LocalShard], Sequence[str]]:
        return self.state.trained(gradients=gradients), self._trained

    @cached_property
    def _trained(self) -> tuple[str, ...]:
        assert self.config is not None
        moments = f"{OPTIMIZER_PREFIX}{MOMENTS[0]}."
        return tuple(name.removeprefix(moments) for name in state_specs(self.config) if name.startswith(moments))

    @property
    def has_copies(self) -> bool:
        """False if the optimizer is distributed: ranks update different shards, which `capture` gathers on all ranks."""
        return not getattr(self.config and self.config.engine, "distributed_optimizer", False)

    def loaded(self, state: CheckpointState) -> None:
        self.state.loaded(state.tensors())


@contextmanager
def megatron_world(config: Config) -> Iterator[None]:
    """Makes Megatron's process groups for the `with` block. With engine.cpu_trial, Megatron then runs on the CPU."""
    engine: Any = config.engine
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module="megatron")  # hides warnings about missing optional packages
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # on collectives
        if engine.cpu_trial:
            stack.enter_context(megatron_on_cpu())
        degrees = {"tp": engine.tp, "pp": engine.pp, "vpp": engine.vpp, "cp": engine.cp}
        stack.enter_context(
            model_parallel(ep=config.parallel.ep, seed=config.run.seed, timeout=config.parallel.timeout_seconds, **degrees)
        )
        yield


@contextmanager
def megatron_engine(context: EngineContext) -> Iterator[Training]:
    """Makes model, optimizer and training step of `engine.kind=megatron`."""
    with megatron_world(context.config):
        yield build_megatron_training(*context)


def build_megatron_training(config: Config, manifest: Manifest, placement: ExpertPlacement, mesh: Mesh) -> Training:
    """Builds this rank's part of the model with its weights, and Megatron's optimizer. Call it inside `megatron_world`."""
    from moe_dist.megatron.gpt import DTYPES, Gpt
    from moe_dist.megatron.layer_watch import LayerWatch
    from moe_dist.megatron.pipeline import Pipeline
    from moe_dist.train.build.pipeline_state import GptState
    from moe_dist.train.step.pipeline_step import PipelineModel, PipelineParallel, PipelineStep

    check_expert_gemm(config, mesh.device)
    model, seed = config.model, config.run.seed
    engine: Any = config.engine
    comm_stats = CommStats()
    scope = _selection_scope(config, mesh, comm_stats)
    make = partial(build_router, model, router_context(config, placement.groups, selection_scope=scope))
    all_to_all = AllToAll(mesh.ep, comm_stats, mesh.tracker)
    nodes, tokens = (mesh.inter_node, mesh.intra_node), config.train.micro_batch * config.data.seq_len
    tokens //= engine.tp * engine.cp
    context = dispatch_context(config.parallel, placement, all_to_all, model.hidden_dim, nodes, tokens=tokens)
    dispatcher = config.parallel.dispatch.build(context)
    watch = LayerWatch(placement, config, mesh.device, make, mesh.tracker, comm_stats, dispatcher)
    initial = partial(initial_value, seed=seed, std=model.init_std, num_layers=model.num_layers)

    def decays(name: str, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and role_of_name(name) not in NO_DECAY

    args = model_args(config, DTYPES[config.parallel.precision])
    gpt = Gpt(config, args, placement, watch, initial=initial, decays=decays)
    if gpt.place.ep_rank != mesh.ep_rank:
        raise AssertionError(f"Megatron's EP rank {gpt.place.ep_rank} is not {mesh.ep_rank}")
    counts_losses = gpt.last_stage and gpt.place.tp_rank == 0
    parallel = PipelineParallel(
        PipelineModel(gpt, Pipeline(gpt, watch), watch),
        mesh,
        reader=(gpt.groups.dp.rank(), gpt.groups.dp.size()),
        counts_tokens=counts_losses and gpt.groups.cp.rank() == 0,
        counts_losses=counts_losses,
        layer_ranks=gpt.groups.tp_dp_cp,
    )
    optimizer = gpt.optimizer()
    routers = [gpt.routers.get(layer) for layer in model.moe_layers]
    balance = build_balance(model.moe, routers, placement.groups, mesh.device)
    thresholds = build_thresholds(model.moe, routers, placement.groups, mesh.device)
    step = PipelineStep(
        parallel,  # pyright: ignore[reportArgumentType]
        optimizer,
        placement=placement,
        group_of_modality=group_of_modality(manifest, placement),
        clip_norm=config.optimizer.clip_norm,
        comm_stats=comm_stats,
        controllers=[each for each in (balance, thresholds) if each is not None],
        needs_global_batch_info=model.moe.router.needs_global_batch_info,
    )
    state: Any = GptState(gpt, optimizer)
    return MegatronTraining(
        parallel,  # pyright: ignore[reportArgumentType]
        optimizer,
        step,
        balance=balance,
        state=state,
        config=config,
    )


def _selection_scope(config: Config, mesh: Mesh, comm_stats: CommStats) -> SelectionScope:
    """Returns the ranks whose tokens compete for an expert in expert choice. Tensor and context-parallel ranks that share
    sequences count as one rank. The scope `ep_group` needs tp = cp = 1; the engine's section checks this."""
    groups = process_groups()
    kind, reader, readers = config.model.moe.router.selection_scope, groups.dp.rank(), groups.dp.size()
    first = reader - mesh.ep_rank
    ranks = {"rank": (reader,), "ep_group": range(first, first + config.parallel.ep), "world": range(readers)}[kind]
    group = {"rank": None, "ep_group": mesh.ep, "world": groups.dp if readers > 1 else None}[kind]
    shares = tuple(each for each in (groups.tp, groups.cp) if each.size() > 1)
    own = ranks.index(reader)
    return SelectionScope(kind, group, tuple(ranks), own, comm_stats=comm_stats, tracker=mesh.tracker, shares=shares)
