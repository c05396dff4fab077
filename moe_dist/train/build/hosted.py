"""Makes model, optimizer and training step of `engine.kind=transformers`."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.hf.host.banks import GUIDE, banks_of
from moe_dist.hf.host.choices import add_null_rows
from moe_dist.hf.host.dense import hosted_family
from moe_dist.hf.host.lora import add_adapters, first_values
from moe_dist.hf.host.model import HostedModel, own_values, with_owners
from moe_dist.hf.host.pictures import check_encoder
from moe_dist.hf.host.weights import read_folder
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.losses import StepLoad
from moe_dist.parallel.initialise import allocate, set_whole
from moe_dist.parallel.parallelize import ParallelModel, shard
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.build.dispatch import NodeGroups, dispatch_context
from moe_dist.train.build.moe_layers import build_balance, router_context
from moe_dist.train.build.training import (
    COMPUTE_DTYPES,
    EngineContext,
    Training,
    build_model,
    build_optimizer,
    context_on,
    freeze,
    group_of_modality,
    model_args,
    wiring,
)
from moe_dist.train.build.tuning import NO_TASK_GRADIENT, build_tuning
from moe_dist.train.step.training_step import TrainingStep


def build_hosted(
    config: Config,
    placement: ExpertPlacement,
    *,
    ep_rank: int,
    ep_group: dist.ProcessGroup | None,
    node_groups: NodeGroups = (None, None),
    comm_stats: CommStats | None = None,
    tracker: CollectiveTracker | None = None,
    compute_dtype: torch.dtype | None = None,
    kernels: RowKernels = TORCH,
    **_: Any,
) -> HostedModel:
    """Makes the family's model with this rank's experts, on torch's default device. See `build_transformer`."""
    model = config.model
    dtype = compute_dtype or COMPUTE_DTYPES[config.parallel.precision]
    all_to_all = AllToAll(ep_group, comm_stats or CommStats(), tracker)
    family = hosted_family(model)
    family.train()
    banks = banks_of(family)
    if num_null := sum(group.num_null for group in placement.groups):
        for bank in banks:
            add_null_rows(family.get_submodule(bank.router), num_null)
    tokens = config.train.micro_batch * config.data.seq_len
    context = dispatch_context(
        config.parallel, placement, all_to_all, model.hidden_dim, node_groups, kernels, tokens=tokens
    )
    adapters = () if model.lora is None else add_adapters(family, model.lora)
    hosted = HostedModel(
        family,
        model_args(config, dtype),
        banks,
        local=placement.slots[ep_rank],
        make_router=partial(model.moe.router.build_hosted, router_context(config, placement.groups)),
        dispatcher=config.parallel.dispatch.build(context),
        recompute=config.parallel.recompute,
    )
    hosted.adapters = adapters
    return hosted


@dataclass(frozen=True)
class HostedTraining(Training):
    """A model of transformers. A new run begins with the weights of `model.folder`."""

    config: Config | None = None
    local: tuple[int, ...] = ()

    def begin(self) -> str:
        """Reads the weights of `model.folder`. Returns a line to print."""
        config, model = self.config, self.parallel.model
        assert config is not None
        if config.model.folder is None:
            return ""
        read_folder(model, Path(config.model.folder), self.local, set_whole)  # pyright: ignore[reportArgumentType]
        if config.model.lora is not None:
            for parameter, whole in first_values(model, config.model.lora, self.local, config.run.seed):
                set_whole(parameter, whole)
        if model.encodes:
            check_encoder(model)
        return f"model.folder: weights of {config.model.folder}"


@contextmanager
def transformers_engine(context: EngineContext) -> Iterator[Training]:
    """Makes model, optimizer and training step of `engine.kind=transformers`."""
    config, manifest, placement, mesh = context
    comm_stats, section = CommStats(), config.parallel
    with torch.device("meta"):
        model = build_model(config, placement, **wiring(mesh, comm_stats))
    if manifest.pictures is not None and not model.encodes:
        raise ConfigError(
            f"data.path={config.data.path!r}: the data have pictures, but {config.model.family} is trained without an "
            "encoder of pictures; take other data, or a family such as Qwen3-VL-MoE or ERNIE-4.5-VL-MoE",
            see=GUIDE,
        )
    freeze(model, config)
    if section.data == "fsdp2":
        shard(model, mesh, COMPUTE_DTYPES[section.precision])
    allocate(model, mesh.device)
    local = placement.slots[mesh.ep_rank]
    draw(model, local, config.run.seed)
    torch.manual_seed(config.run.seed * mesh.world_size + mesh.rank)  # for a family's dropout, which differs on each rank
    parallel = ParallelModel(model, mesh, section.data, fsdp_gather=section.fsdp_gather)
    optimizer = build_optimizer(config, model)
    groups = group_of_modality(manifest, placement)
    tuning = build_tuning(config, manifest, parallel, groups)
    model.ready()  # later than all that reads parameters, because FSDP2 leaves the last ones gathered
    nulls = any(group.num_null for group in placement.groups)
    if tuning is not None and model.no_task_gradient and not nulls:
        if not tuning.weight:
            raise ConfigError(
                f"router_tuning.weight=0: the routers of {config.model.family} give a token's single expert a constant "
                "weight, so that cross entropy gives no router a gradient; set it above 0, or tune a model of more experts "
                "a token"
            )
        if mesh.rank == 0:
            print(NO_TASK_GRADIENT)
    layers = model.moe_modules()
    if config.model.moe.router.softmax_top_k and config.model.moe.balance and not nulls:
        share_biases(model)
    balance = build_balance(config.model.moe, [layer.router for layer in layers], placement.groups, mesh.device)
    load = StepLoad(placement.groups, len(layers), mesh.device) if config.loss.balance.scope == "step" else None
    step = TrainingStep(
        parallel,
        optimizer,
        placement=placement,
        group_of_modality=groups,
        clip_norm=config.optimizer.clip_norm,
        comm_stats=comm_stats,
        controllers=[each for each in (balance, load) if each is not None],
        tuning=tuning,
        load=load,
    )
    dispatch = context_on(mesh, config, placement, comm_stats)
    yield HostedTraining(parallel, optimizer, step, dispatch, balance, tuning, load, config=config, local=local)


def share_biases(model: HostedModel) -> None:
    """Makes this project's routers share the family's selection biases [E], which controllers change in place. The biases
    are the only saved buffer of this shape in a router or in the block that has the router. Raises ConfigError if there is
    no such buffer or more than one. Must be called when the buffers have memory."""
    layers = {layer.name: layer for layer in model.moe_modules()}
    for bank in model.banks:
        num_experts = len(bank.ids)
        block = model.family.get_submodule(bank.router.rpartition(".")[0])
        found = [
            each for module in (model.family.get_submodule(bank.router), block) for each in _saved(module, num_experts)
        ]
        if len(found) != 1:
            raise ConfigError(
                f"model.moe.balance: controllers change the selection bias of a family's router, but {bank.router} has "
                f"{len(found)} saved buffers of {num_experts} numbers, and not one; remove the controllers",
                see=GUIDE,
            )
        layers[f"layers.{bank.layer}"].router.get_submodule(group_module(bank.group)).register_buffer("bias", found[0])


def _saved(module: nn.Module, num_experts: int) -> list[Tensor]:
    buffers, others = dict(module.named_buffers(recurse=False)), module._non_persistent_buffers_set
    return [each for name, each in buffers.items() if tuple(each.shape) == (num_experts,) and name not in others]


@torch.no_grad()
def draw(model: HostedModel, slots: Sequence[int], seed: int) -> None:
    """Initialises every parameter by the family's own rule, from (seed, name). The values do not depend on the layout of
    ranks. The host draws the whole tensors of one module or of one expert at a time. `slots` are this rank's experts."""
    experts, drawn_before = {bank.experts: bank.local(slots) for bank in model.banks}, set[int]()
    for path, module, owner in with_owners(model.family):
        own = {name: each for name, each in module.named_parameters(recurse=False) if id(each) not in drawn_before}
        drawn_before.update(map(id, own.values()))  # a tied weight is drawn once
        if not own:
            continue
        if path not in experts:
            made = _drawn(owner, module, {name: tuple(each.shape) for name, each in own.items()}, f"{seed}/{path}")
            for name, parameter in own.items():
                set_whole(parameter, made[name])
            continue
        alone = {name: (1, *each.shape[1:]) for name, each in own.items()}
        drawn = [_drawn(owner, module, alone, f"{seed}/{path}.{expert}") for expert in experts[path]]
        for name, parameter in own.items():
            stack = torch.cat([each[name] for each in drawn]) if drawn else torch.empty(tuple(parameter.shape))
            set_whole(parameter, stack)


def _drawn(family: Any, module: Any, shapes: dict[str, tuple[int, ...]], name: str) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        return own_values(family, module, shapes)
