"""Makes Megatron's GPTModel, DDP and optimizer from a run's configuration (engine.kind=megatron).

Weights and training steps equal those of this project's own engine. Initial weights are drawn by logical name, weight decay
is the same, and a step's loss is summed over ranks and micro-batches (Megatron's per-token loss without its division).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_dist.config.base.section import named
from moe_dist.config.parallel.section import ExplicitSection
from moe_dist.config.schema import Config
from moe_dist.megatron.core_attention import DocumentAttention, LatentAttention
from moe_dist.megatron.decoder_layer import decoder_layer_spec
from moe_dist.megatron.layer_watch import LayerWatch
from moe_dist.megatron.settings import ExpertSettings
from moe_dist.megatron.tensors import Piece, Place, pieces
from moe_dist.model.attention import Attention, SinkAttention
from moe_dist.model.layers import ModelArgs, RMSNorm
from moe_dist.placement.placement import ExpertPlacement

# Arguments for Megatron's TransformerConfig that select SwiGLU layers without biases, dropout or Apex kernels.
PLAIN: Mapping[str, Any] = {
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "add_bias_linear": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECOMPUTE = {"none": (None, None), "experts": ("selective", ["moe_act"])}  # granularity and modules by parallel.recompute
NO_DECAY_ATTRIBUTE = "moe_dist_no_decay"
Initial = Callable[[nn.Module, str, str, tuple[int, ...]], Tensor]
Decays = Callable[[str, tuple[int, ...]], bool]


class Norm(RMSNorm):
    """RMSNorm with the arguments of Megatron's norm. Under sequence parallelism Megatron sums its gradient over TP."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


class FullNorm(RMSNorm):
    """RMSNorm over all heads together (OLMoE), for queries or keys [s, B, heads of this rank, d]. A tensor-parallel rank
    has the weights of its heads. Forward and backward each sum one number per token over TP."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, heads: int) -> None:
        super().__init__(heads * hidden_size // config.tensor_model_parallel_size, eps)
        self.width = heads * hidden_size
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        own = exact.square().sum((2, 3), keepdim=True)
        total = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(own))
        scaled = exact * torch.rsqrt(total / self.width + self.eps)
        return (scaled * self.weight.view(x.shape[2:])).to(x.dtype)


class BiasedProjection(RowParallelLinear):
    """The output projection of attention with a bias, which Megatron otherwise has only if all projections have one."""

    def __init__(self, *sizes: int, bias: bool, **options: Any) -> None:
        super().__init__(*sizes, bias=True, **options)


def transformer_config(config: Config) -> TransformerConfig:
    """Returns Megatron's configuration for the model and its parallelism."""
    model, parallel = config.model, config.parallel
    engine: Any = config.engine
    moe, dtype = model.moe, DTYPES[parallel.precision]
    granularity, modules = RECOMPUTE[parallel.recompute]
    first = next(iter(moe.groups.values()))
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_dim,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.resolved_head_dim,
        ffn_hidden_size=model.dense_ffn_dim or first.ffn_dim,
        num_moe_experts=sum(group.num_experts for group in moe.groups.values()),
        moe_router_topk=max(2, first.top_k),  # Megatron refuses 1; it uses top_k and the width only to count FLOPs
        moe_ffn_hidden_size=first.ffn_dim,
        moe_layer_freq=[int(layer in model.moe_layers) for layer in range(model.num_layers)],
        moe_shared_expert_intermediate_size=moe.shared_ffn_dim or None,
        moe_shared_expert_gate=moe.shared_gate,
        moe_router_load_balancing_type="none",  # the training step adds the auxiliary terms
        moe_token_dispatcher_type="alltoall",
        tensor_model_parallel_size=engine.tp,
        pipeline_model_parallel_size=engine.pp,
        virtual_pipeline_model_parallel_size=engine.vpp if engine.vpp > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(engine.layers),  # pyright: ignore[reportArgumentType]
        context_parallel_size=engine.cp,
        # On two stages, an interleaved schedule can put two sends between the same two ranks into one batch of sends and
        # receives. A receive could then match the wrong send.
        overlap_p2p_comm=engine.vpp > 1,
        batch_p2p_comm=engine.vpp == 1,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,
        sequence_parallel=engine.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=parallel.precision == "bf16",
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_qkv_bias=model.attention_bias != "none",
        transformer_impl="local",
        **PLAIN,
        use_cpu_initialization=engine.cpu_trial,
        recompute_granularity=granularity,
        recompute_modules=modules,
        moe_grouped_gemm=modules is not None,  # Megatron requires this option for moe_act; `ExpertLayer` ignores it
        calculate_per_token_loss=True,  # makes Megatron sum losses over ranks and micro-batches
        finalize_model_grads_func=_finalise,  # skips the division by Megatron's token count
    )


def _pipeline_layout(layers: Sequence[int] | None) -> list[list[str]] | None:
    """Returns Megatron's list of the layers in each part of the model."""
    parts = [["decoder"] * count for count in layers or ()]
    return [["embedding", *parts[0]], *parts[1:-1], [*parts[-1], "loss"]] if len(parts) > 1 else None


def _finalise(chunks: list[Any], _: Tensor | None, **options: Any) -> None:
    finalize_model_grads(chunks, None, **options)


def expert_settings(config: Config, placement: ExpertPlacement) -> ExpertSettings:
    """Returns the settings of the expert layers. A token's modality id is the index of its expert group."""
    parallel, moe = config.parallel, config.model.moe
    return ExpertSettings.model_construct(
        groups={name: group.model_copy(update={"modalities": ()}) for name, group in moe.groups.items()},
        router=moe.router,
        placement=ExplicitSection(slots=tuple(tuple(map(placement.name_of, slots)) for slots in placement.slots)),
        expert_pair_budget=parallel.expert_pair_budget,
        expert_gemm=parallel.expert_gemm,
    )


class Gpt:
    """The model's parts (chunks) on this rank, in Megatron's DDP: several in an interleaved pipeline, otherwise one.

    Args:
        initial: Returns the whole initial value of a logical tensor, fp32 on the host. Its arguments are a part of the
            model, the parameter's name in this part, and the tensor's logical name and shape.
        decays: Takes a tensor's logical name and shape, and returns whether the tensor has weight decay.

    Attributes:
        chunks: The model's parts on this rank, wrapped for data parallelism, in the order of their layers.
        place: The rank's position in the model, which determines its parameters' logical names.
        routers: The router of each MoE layer on this rank, by layer index.
        last_stage: Whether this rank has the last part of the model, which computes the losses.
        tp_mesh: Megatron's group of tensor-parallel ranks as a mesh, on the device where a checkpoint's tensors are.
        distributed: Whether the optimizer's state is sharded over data-parallel ranks.
    """

    def __init__(
        self,
        config: Config,
        args: ModelArgs,
        placement: ExpertPlacement,
        watch: LayerWatch,
        *,
        initial: Initial,
        decays: Decays,
    ) -> None:
        self.config, self.args, self.megatron = config, args, transformer_config(config)
        self._engine: Any = config.engine
        self.distributed = self._engine.distributed_optimizer
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        watch.every_rank = self.groups.tp_dp_cp
        self.last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        host = self._engine.cpu_trial or self.distributed  # a sharded state is gathered into host memory
        self.tp_mesh = DeviceMesh.from_group(self.groups.tp, "cpu" if host else "cuda")
        self.place = Place(
            args=args,
            placement=placement,
            ep_rank=self.groups.ep.rank(),
            tp_rank=self.groups.tp.rank(),
            tp_size=self.groups.tp.size(),
        )
        settings = expert_settings(config, placement)
        stages: Sequence[int | None] = range(self._engine.vpp) if self._engine.vpp > 1 else [None]
        models = [self._chunk(settings, stage, watch) for stage in stages]
        self._first_layers = [get_transformer_layer_offset(self.megatron, stage, self.groups.pp.rank()) for stage in stages]
        self._names = [[name for name, _ in each.named_parameters()] for each in models]
        self._initialise(models, initial, decays)
        wrapped = [Float16Module(self.megatron, each) if self.megatron.bf16 else each for each in models]
        self.routers = watch.routers
        for router in self.routers.values():
            with next(router.parameters()).device:
                router.reset_buffers()  # pyright: ignore[reportCallIssue]: Float16Module has cast them to bf16
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=self.distributed,
            check_for_nan_in_grad=False,  # if there is a NaN, the training step is skipped on all ranks
        )
        self.chunks = [
            DistributedDataParallel(self.megatron, ddp, each, disable_bucketing=number > 0)
            for number, each in enumerate(wrapped)
        ]

    def _chunk(self, settings: ExpertSettings, stage: int | None, watch: LayerWatch) -> GPTModel:
        model = self.config.model
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        chunk = GPTModel(
            config=self.megatron,
            transformer_layer_spec=self._block(settings, stage, watch),  # pyright: ignore[reportArgumentType]
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_seq_len,
            pre_process=first,
            post_process=last,
            position_embedding_type="none",  # `DocumentAttention` rotates queries and keys
            share_embeddings_and_output_weights=model.tie_embeddings,
            vp_stage=stage,
        )
        return chunk if self._engine.cpu_trial else chunk.cuda()

    def _block(self, settings: ExpertSettings, stage: int | None, watch: LayerWatch) -> TransformerBlockSubmodules:
        stock: Any = get_gpt_decoder_layer_specs(self.megatron, use_transformer_engine=False, normalization="RMSNorm")
        first = get_transformer_layer_offset(self.megatron, stage, self.groups.pp.rank())
        count = get_num_layers_to_build(self.megatron, stage, self.groups.pp.rank())
        spec = decoder_layer_spec(settings)
        layers = []
        for layer, window in zip(stock[first : first + count], self.args.windows[first : first + count], strict=True):
            parts = replace(
                layer.submodules,
                self_attention=self._attention(layer.submodules.self_attention, window),
                input_layernorm=Norm,
                pre_mlp_layernorm=Norm,
            )
            layers.append(ModuleSpec(spec.module, {**spec.params, "watch": watch}, parts))
        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm)  # pyright: ignore[reportArgumentType]

    def _attention(self, stock: ModuleSpec, window: int | None) -> ModuleSpec:
        """Returns the spec of a layer's attention, with everything in which it differs from Megatron's `stock`."""
        args, section = self.args, self.config.model.attention
        kind = named(section.builds)
        if not issubclass(kind, Attention):
            return ModuleSpec(LatentAttention, {"args": args, "make": section.build, "window": window})
        q_norm, k_norm = (
            {"none": None, "head": Norm, "full": ModuleSpec(FullNorm, {"heads": heads})}[args.qk_norm]
            for heads in (args.num_heads, args.num_kv_heads)
        )
        core = ModuleSpec(DocumentAttention, {"window": window, "pairs": args.rope_pairs, "sinks": kind is SinkAttention})
        inside: Any = replace(stock.submodules, core_attention=core, q_layernorm=q_norm, k_layernorm=k_norm)  # pyright: ignore
        if args.attention_bias == "qkvo":
            inside = replace(inside, linear_proj=BiasedProjection)
        return replace(stock, submodules=inside)

    def pieces(self, chunk: int, name: str, tensor: Tensor) -> list[Piece]:
        """Returns the logical tensors in a parameter, or in a moment of a parameter, of the model's part `chunk`."""
        return list(pieces(name, tensor, self.place, first_layer=self._first_layers[chunk]))

    def parameters(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        """Yields (index of the model's part, Megatron's name, parameter) of each parameter with elements on this rank."""
        for number, (names, chunk) in enumerate(zip(self._names, self.chunks, strict=True)):
            for name, parameter in zip(names, chunk.parameters(), strict=True):
                if parameter.numel():
                    yield number, name, parameter

    @torch.no_grad()
    def _initialise(self, models: Sequence[GPTModel], initial: Initial, decays: Decays) -> None:
        """Sets every weight, and marks the weights that get no weight decay."""
        place = self.place
        for chunk, model in enumerate(models):
            for name, parameter in model.named_parameters():
                for piece in self.pieces(chunk, name, parameter) if parameter.numel() else ():
                    whole = initial(model, name, piece.name, piece.whole_shape(place.tp_size))
                    piece.set(whole if piece.dim is None else whole.chunk(place.tp_size, piece.dim)[place.tp_rank])
                    setattr(parameter, NO_DECAY_ATTRIBUTE, not decays(piece.name, piece.shape))

    def optimizer(self) -> Any:
        """Makes Megatron's optimizer for `chunks`. Call this method once. The parameter groups have their final weight
        decay, and the training step sets their learning rate."""
        section = self.config.optimizer
        settings = OptimizerConfig(
            optimizer="adam",
            lr=section.lr,
            weight_decay=section.weight_decay,
            adam_beta1=section.betas[0],
            adam_beta2=section.betas[1],
            adam_eps=section.eps,
            clip_grad=section.clip_norm or 0.0,
            bf16=self.megatron.bf16,
            params_dtype=self.megatron.params_dtype,
            use_distributed_optimizer=self.distributed,
        )
        overrides: Any = {ParamKey(attr=NO_DECAY_ATTRIBUTE): {"wd_mult": 0.0}}
        optimizer = get_megatron_optimizer(settings, list(self.chunks), config_overrides=overrides)
        for group in optimizer.param_groups:  # Megatron's scheduler would set the weight decay, but is not used
            group["weight_decay"] = section.weight_decay * group["wd_mult"]
        return optimizer
