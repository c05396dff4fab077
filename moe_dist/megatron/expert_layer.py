"""Wraps moe_dist's MoE layer as a Megatron module that uses Megatron's process groups.

Shape letters: s positions on this rank, B sequences, T = s x B tokens, D hidden size.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.errors import ConfigError
from moe_dist.megatron.layer_watch import LayerWatch, layer_terms
from moe_dist.megatron.modality import PADDING, groups_of_rank
from moe_dist.megatron.settings import GUIDE, ExpertSettings
from moe_dist.megatron.sharding import sharded_layer_state
from moe_dist.megatron.versions import record
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.experts.activations import SWIGLU
from moe_dist.moe.experts.experts import Experts, on_host
from moe_dist.moe.experts.static_storage import on_device
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.losses import ColumnTables
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routing.types import NO_REQUEST, LayerReport, Recompute
from moe_dist.placement.parameter_names import group_module, named_parameters
from moe_dist.placement.placement import ExpertPlacement


class UntimedCommStats(CommStats):
    """Counts bytes, but measures no wait times, because Megatron's training loop would never collect the CUDA events."""

    @contextlib.contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        yield


class MegatronLmWatch(nn.Module):
    """Replaces `LayerWatch` for one layer, with options from Megatron's configuration and the expert settings. Megatron's
    scaler adds the gradients of balance loss and z loss in backward, and Megatron's tracker logs both losses. As in
    `moe_dist.train.objective.loss`, both use a micro-batch's counts over all ranks of the pipeline stage (TP x CP x DP).
    """

    request, static, activation = NO_REQUEST, False, SWIGLU

    def __init__(
        self,
        config: TransformerConfig,
        settings: ExpertSettings,
        groups: ProcessGroupCollection,
        placement: ExpertPlacement,
    ) -> None:
        super().__init__()
        self._config, self._settings, self._groups, self._placement = config, settings, groups, placement
        self.comm_stats = UntimedCommStats()
        all_to_all = AllToAll(groups.ep if groups.ep.size() > 1 else None, self.comm_stats)
        context = DispatchContext(placement, all_to_all, max_receive_rows=settings.max_receive_rows)
        self.dispatcher = AllToAllDispatcher(context)

    def make_router(self, layer: int) -> nn.Module:
        """Makes the router of the layer."""
        return self._settings.router.build(RouterContext(self._config.hidden_size, self._placement.groups, layer=layer))

    def forward(self, layer: int, y_TD: Tensor, report: LayerReport) -> Tensor:
        """Returns `y_TD`. In training, its backward also adds the gradients of the auxiliary terms."""
        return self.attach(layer, y_TD, report) if self.training else y_TD

    def attach(self, layer: int, y_TD: Tensor, report: LayerReport) -> Tensor:
        """Returns `y_TD` with the same values, but its backward also adds the gradients of both losses. Costs one
        all-reduce of a few integers, unless both coefficients are 0 or gradients are off (as in the first forward of full
        recompute)."""
        config, groups = self._config, self._groups
        balances = config.moe_router_load_balancing_type != "none"
        coefficients = (float(config.moe_aux_loss_coeff) if balances else 0.0, config.moe_z_loss_coeff or 0.0)  # pyright: ignore
        if not any(coefficients) or not torch.is_grad_enabled():
            return y_TD
        tables = ColumnTables.on(self._placement.groups, y_TD.device)
        *terms, tokens = layer_terms(report, tables, groups.tp_dp_cp, kind=self._settings.balance)
        # Megatron sums gradients over TP. Then it averages over DP x CP (its scaler has CP / micro-batches), or divides the
        # sum by the step's tokens. `scale` cancels this division, so that the parts of all ranks sum to the loss.
        data_ranks = groups.tp_dp_cp.size() // groups.tp_cp.size()
        scale = tokens if config.calculate_per_token_loss else float(data_ranks)
        for name, term, coefficient in zip(("global_load_balancing_loss", "z_loss"), terms, coefficients, strict=True):
            if coefficient:
                record(name, term, layer + 1, config.num_layers, groups.tp_dp_cp)
                y_TD = MoEAuxLossAutoScaler.apply(y_TD, coefficient * scale * term)  # pyright: ignore[reportAssignmentType]
        return y_TD


class ExpertLayer(MegatronModule):
    """Replaces Megatron's MoELayer in a transformer layer. The output has no bias.

    Args:
        config: Megatron's configuration, which `requirements.check` has accepted.
        layer_number: Index of the layer in the whole model (over all pipeline stages), counted from 1.
        shared: Megatron's tensor-parallel shared expert, or None.
        watch: Makes the router, owns the dispatcher, adds the auxiliary terms, counts bytes, and receives the layer's
            reports. If it is given, the caller sets the weights. If it is None, the layer makes a `MegatronLmWatch` and
            initialises the weights itself.
    """

    group_of_modality_M: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        settings: ExpertSettings,
        *,
        pg_collection: ProcessGroupCollection,
        layer_number: int,
        shared: nn.Module | None = None,
        watch: LayerWatch | None = None,
    ) -> None:
        super().__init__(config)
        _check_groups(pg_collection)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.expert_data_parallel_group = pg_collection.expt_dp
        self.ep_rank = pg_collection.ep.rank()
        self.placement = settings.place(pg_collection.ep.size())
        self.watch = watch or MegatronLmWatch(config, settings, pg_collection, self.placement)
        self.comm_stats = self.watch.comm_stats
        self.moe = _build(config, settings, self.placement, self.watch, ep_rank=self.ep_rank, layer=layer_number - 1)
        self.moe.shared = shared
        group_of_modality = torch.tensor([*settings.group_of_modality(), PADDING], device=_device(config))
        self.register_buffer("group_of_modality_M", group_of_modality, persistent=False)
        if watch is None:
            _initialise(self.moe, self.placement, config, ep_rank=self.ep_rank, layer=layer_number - 1, seed=settings.seed)
        _mark_parameters(self.moe, sequence_parallel=config.sequence_parallel)

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Returns the layer's output [s, B, D] and, in place of a bias, None.

        Args:
            hidden_states: [s, B, D].
            padding_mask: May contain modality ids instead of a mask, see `moe_dist.megatron.modality`.
        """
        length, batch, _ = hidden_states.shape
        group_T = groups_of_rank(
            padding_mask,
            self.group_of_modality_M,
            length=length,
            batch=batch,
            tp_rank=self.tp_group.rank(),
            tp_size=self.tp_group.size(),
        )
        y_TD, report = self.moe(hidden_states.flatten(0, 1), group_T, self.watch.request)
        return self.watch(self.layer_number - 1, y_TD, report).view_as(hidden_states), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return sharded_layer_state(self, prefix, sharded_offsets, metadata)


def _check_groups(groups: ProcessGroupCollection) -> None:
    if groups.expt_tp.size() != 1:
        raise ConfigError(
            f"expert tensor parallel group of {groups.expt_tp.size()} ranks: experts cannot be split over ranks; "
            "initialise Megatron with expert_tensor_parallel_size=1 (its default is the tensor-parallel size)",
            see=GUIDE,
        )


def _build(
    config: TransformerConfig,
    settings: ExpertSettings,
    placement: ExpertPlacement,
    watch: LayerWatch | MegatronLmWatch,
    *,
    ep_rank: int,
    layer: int,
) -> MoELayer:
    """Builds the layer without a shared expert. Its parameters are allocated but not initialised."""
    with torch.device("meta"):
        router: Any = watch.make_router(layer)
        moe = MoELayer(
            norm=nn.Identity(),  # Megatron applies its own pre_mlp_layernorm before this layer
            router=router,
            experts=Experts(
                config.hidden_size,
                placement.groups,
                [len(placement.local_experts(ep_rank, group)) for group in placement.groups],
                storage=on_device if watch.static else on_host,
                pair_budget=settings.expert_pair_budget,
                gemm=settings.expert_gemm,
                activation=watch.activation,
            ),
            dispatcher=watch.dispatcher,
            recompute=_recompute(config),
            name=f"layers.{layer}",
        )
    moe.to(dtype=config.params_dtype).to_empty(device=_device(config))
    with _device(config):
        moe.router.reset_buffers()  # pyright: ignore[reportCallIssue]
    return moe


def _device(config: TransformerConfig) -> torch.device:
    return torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device())


def _recompute(config: TransformerConfig) -> Recompute:
    """Returns the mode for Megatron's selective recompute, or 'none' for full recompute, which wraps the layer."""
    modules = (config.recompute_modules or []) if config.recompute_granularity == "selective" else []
    return "block" if "moe" in modules else "experts" if "moe_act" in modules else "none"


def _mark_parameters(layer: MoELayer, *, sequence_parallel: bool) -> None:
    """Sets the attributes with which Megatron decides how to reduce gradients and compute their norm."""
    for parameter in layer.experts.parameters():
        # If False, Megatron reduces the gradient over the expert data parallel group.
        parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
        # Makes the gradient norm count the parameter on every TP rank, because TP ranks have different experts.
        tensor_parallel.set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        parameter.requires_grad_(parameter.numel() > 0)  # a stack is empty if this rank has no expert of the group
    for parameter in layer.router.parameters():
        # If True, Megatron sums the gradient over TP, because each TP rank routes its own part of the sequence.
        parameter.sequence_parallel = sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def _initialise(
    moe: MoELayer, placement: ExpertPlacement, config: TransformerConfig, *, ep_rank: int, layer: int, seed: int
) -> None:
    """Initialises router and experts with Megatron's initialisers. `down` gets the initialiser of output layers.

    Each matrix is drawn on the host in fp32, from (seed, logical name), so that weights are equal for every layout and
    device. Does nothing if `perform_initialization` is off.
    """
    if not config.perform_initialization:
        return
    prefix = f"layers.{layer}"
    for _, name, _, weight in named_parameters(moe.router):
        weight.copy_(_draw(f"{prefix}.router.{name}", weight, config.init_method, seed))
    for group in placement.groups:
        local = placement.local_experts(ep_rank, group)
        for name, stack in moe.experts.get_submodule(group_module(group.name)).named_parameters():
            initialiser = config.output_layer_init_method if name == "down" else config.init_method
            for weight, expert in zip(stack, local, strict=True):
                logical = f"{prefix}.experts.{group.name}.{expert - group.first_expert}.{name}"
                weight.copy_(_draw(logical, weight, initialiser, seed))  # copy_ casts to the parameter's dtype


def _draw(name: str, like: Tensor, initialiser, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):  # restores only the host's random state; Megatron manages the devices' states
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn = torch.empty(like.shape, dtype=torch.float32, device="cpu")
        initialiser(drawn)
    return drawn
