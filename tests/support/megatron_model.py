"""Builds our transformer, and Megatron's GPTModel with the same weights."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.config.parallel.section import InterleavedSection
from moe_dist.megatron.gpt import PLAIN
from moe_dist.megatron.settings import ExpertSettings
from moe_dist.megatron.tensors import Place, pieces
from moe_dist.model.layers import ModelArgs, RMSNorm, SwiGLU
from moe_dist.model.transformer import Transformer
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.losses import ColumnTables, balance_terms, z_terms
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.placement.parameter_names import Role, named_parameters

HIDDEN_DIM, NUM_HEADS, KV_HEADS, VOCAB_SIZE, SEQ_LEN, LAYERS = 16, 4, 2, 64, 12, 4
SHARED_FFN_DIM, DENSE_FFN_DIM, EPS, STD = 8, 20, 1e-5, 0.3
MOE_LAYERS = (1, 3)  # all other layers are dense
BALANCE, Z = 0.02, 1e-3
ARGS = ModelArgs(
    vocab_size=VOCAB_SIZE,
    hidden_dim=HIDDEN_DIM,
    num_layers=LAYERS,
    num_heads=NUM_HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HIDDEN_DIM // NUM_HEADS,
    moe_layers=MOE_LAYERS,
    dense_ffn_dim=DENSE_FFN_DIM,
    norm_eps=EPS,
)

TWO_GROUPS = {
    "groups": {
        "text": {"num_experts": 5, "num_null": 3, "top_k": 3, "ffn_dim": 6},
        "image": {"num_experts": 3, "num_null": 2, "top_k": 2, "ffn_dim": 10},
    }
}
ONE_GROUP = {"groups": {"all": {"num_experts": 8, "top_k": 2, "ffn_dim": 6}}}
# Megatron's options of recomputation.
RECOMPUTE_ALL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECOMPUTE_MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


@dataclass(frozen=True)
class Layout:
    """The sizes of Megatron's parallel groups, and the settings of the experts."""

    ep: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    uneven: bool = False
    values: Mapping[str, Any] = field(default_factory=lambda: TWO_GROUPS)
    aux: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [
            f"ep{self.ep}",
            f"tp{self.tp}" * (self.tp > 1),
            f"pp{self.pp}" * (self.pp > 1),
            f"cp{self.cp}" * (self.cp > 1),
            "uneven" * self.uneven,
        ]
        return "-".join(part for part in [*parts, *(str(key) for key in self.options)] if part)

    @property
    def settings(self) -> ExpertSettings:
        """Interleaves the experts. If `uneven`, the first rank has all but three experts, and the last of four has none."""
        settings = ExpertSettings.model_validate_json(json.dumps(self.values))
        if not self.uneven:
            return settings
        names = [f"{group.name}/{i}" for group in settings.expert_groups() for i in range(group.num_experts)]
        slots: list[list[str]] = [[] for _ in range(self.ep)]
        for i, name in enumerate(names):
            slots[0 if i < len(names) - 3 else 1 + i % max(1, self.ep - 2)].append(name)
        placement = {"policy": "explicit", "slots": slots}
        return ExpertSettings.model_validate_json(json.dumps({**self.values, "placement": placement}))


def transformer_config(layout: Layout) -> Any:
    """Returns Megatron's TransformerConfig with the common sizes."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts = sum(group.num_experts for group in layout.settings.groups.values())
    options: dict[str, Any] = {
        "num_layers": LAYERS, "hidden_size": HIDDEN_DIM, "num_attention_heads": NUM_HEADS,
        "num_query_groups": KV_HEADS, "ffn_hidden_size": DENSE_FFN_DIM, "num_moe_experts": experts,
        "moe_router_topk": 2, "moe_ffn_hidden_size": 6,
        "moe_layer_freq": [int(layer in MOE_LAYERS) for layer in range(LAYERS)],
        "moe_shared_expert_intermediate_size": SHARED_FFN_DIM, "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": BALANCE if layout.aux else 0.0, "moe_z_loss_coeff": Z if layout.aux else None,
        "moe_token_dispatcher_type": "alltoall", "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": 1, "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp, "context_parallel_size": layout.cp,
        "sequence_parallel": layout.tp > 1, "pipeline_dtype": torch.float32, "normalization": "RMSNorm",
        "layernorm_epsilon": EPS, "transformer_impl": "local", "use_cpu_initialization": True, "init_method_std": STD,
        **PLAIN, "params_dtype": torch.float32,
    }  # fmt: skip
    return TransformerConfig(**{**options, **layout.options})


def gpt_model(config: Any, spec: Any) -> Any:
    """Returns Megatron's GPTModel with a layer spec."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQ_LEN,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def decoder_spec(layout: Layout, config: Any) -> Any:
    """Returns the spec of our decoder layers. Megatron's norms for sequence parallelism need Transformer Engine or
    Apex. Without these packages a block has the engine's norm."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from moe_dist.megatron.decoder_layer import decoder_layer_spec
    from moe_dist.megatron.gpt import Norm

    spec = decoder_layer_spec(layout.settings)
    if layout.tp == 1:
        return spec
    stock: Any = get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization="RMSNorm")
    layers = []
    for layer in range(LAYERS):
        submodules = replace(stock[layer].submodules, input_layernorm=Norm, pre_mlp_layernorm=Norm)
        layers.append(ModuleSpec(spec.module, spec.params, submodules))
    norm: Any = Norm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def our_model(settings: ExpertSettings, *, seed: int = 3) -> Transformer:
    """Returns our transformer on one rank, with weights drawn from `seed`."""
    placement, wire = settings.model_copy(update={"placement": InterleavedSection()}).place(1), AllToAll(None, CommStats())

    def make_moe(_: int) -> MoELayer:
        return MoELayer(
            norm=RMSNorm(HIDDEN_DIM, EPS),
            router=TopKRouter(RouterContext(HIDDEN_DIM, placement.groups)),
            experts=Experts(HIDDEN_DIM, placement.groups, [group.num_experts for group in placement.groups]),
            dispatcher=AllToAllDispatcher(DispatchContext(placement, wire)),
            shared=SwiGLU(HIDDEN_DIM, SHARED_FFN_DIM),
        )

    model = Transformer(ARGS, make_moe)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, STD, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of made-up tokens: ids, next tokens, and modality ids (-1 for padding)."""

    tokens_BS: Tensor
    labels_BS: Tensor
    modality_BS: Tensor

    def part(self, sequences: slice) -> "TokenBatch":
        return TokenBatch(self.tokens_BS[sequences], self.labels_BS[sequences], self.modality_BS[sequences])

    @property
    def positions(self) -> Tensor:
        """The position of each token, [B, S]."""
        return torch.arange(SEQ_LEN).expand(self.tokens_BS.shape)


def batch_of(count: int, settings: ExpertSettings, *, seed: int = 5) -> TokenBatch:
    """Sequence 0 has only the first modality, sequence 1 only the last, and others are mixed. A few tokens are padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB_SIZE, (count, SEQ_LEN), generator=generator)
    labels = torch.randint(0, VOCAB_SIZE, (count, SEQ_LEN), generator=generator)
    modalities = len(settings.group_of_modality())
    modality = torch.randint(0, modalities, (count, SEQ_LEN), generator=generator)
    modality[0], modality[1 % count] = 0, modalities - 1
    modality[-1, -2:] = -1
    return TokenBatch(tokens, labels, modality)


def causal_mask() -> Tensor:
    """Returns Megatron's mask, which is true where a query must not see a key."""
    return ~torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()[None, None]


def our_loss(
    model: Transformer, batch: TokenBatch, settings: ExpertSettings, *, aux: bool, masked: bool = False
) -> tuple[Tensor, Tensor, dict[str, list[float]]]:
    """Runs the oracle. Returns the mean cross entropy over all tokens (without padding if `masked`) plus the auxiliary
    terms, the logits, and each MoE layer's auxiliary terms without coefficients."""
    groups = torch.tensor([*settings.group_of_modality(), -1])[batch.modality_BS]
    logits, reports = model(batch.tokens_BS, batch.positions, torch.zeros_like(batch.tokens_BS), groups)
    labels = batch.labels_BS.masked_fill(batch.modality_BS < 0, -100) if masked else batch.labels_BS
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    tables = ColumnTables.on(settings.expert_groups(), torch.device("cpu"))
    terms: dict[str, list[float]] = {"global_load_balancing_loss": [], "z_loss": []}
    for counts, sums in ((report.counts, report.aux) for report in reports):
        balance = balance_terms(sums.prob_LC, counts.choices_LC, counts.tokens_LG, tables).sum()
        z = z_terms(sums.log_z_squared_LG, counts.tokens_LG).sum()
        loss = loss + BALANCE * balance + Z * z if aux else loss
        for values, term in zip(terms.values(), (balance, z), strict=True):
            values.append(float(term))
    return loss, logits, terms


def place_of(layout: Layout, state: Any) -> Place:
    """Returns this rank's place in the model; `state` is Megatron's `parallel_state`."""
    return Place(
        args=ARGS,
        placement=layout.settings.place(layout.ep),
        ep_rank=state.get_expert_model_parallel_rank(),
        tp_rank=state.get_tensor_model_parallel_rank(),
        tp_size=state.get_tensor_model_parallel_world_size(),
    )


def megatron_tensors(model: Any, ours: Transformer, place: Place, *, gradients: bool = False) -> dict[str, Tensor]:
    """Returns our model's weights or gradients as one Megatron rank stores them, by the names of its parameters."""
    whole: dict[str, Tensor] = {}
    for each in named_parameters(ours):
        tensor: Any = each.parameter.grad if gradients else each.parameter.detach()
        stem, _, leaf = each.name.rpartition(".")
        stacked = each.role is Role.EXPERT
        whole |= {f"{stem}.{i}.{leaf}": part for i, part in enumerate(tensor)} if stacked else {each.name: tensor}
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found[name] = torch.full_like(parameter, float("nan"))  # a value that no piece sets stays NaN
        for piece in pieces(name, found[name], place, first_layer=0):
            tensor = whole[piece.name]
            piece.set(tensor if piece.dim is None else tensor.chunk(place.tp_size, piece.dim)[place.tp_rank])
    return found


def expert_layers(model: Any) -> Iterator[Any]:
    """Yields the ExpertLayers of a Megatron model in order."""
    from moe_dist.megatron.expert_layer import ExpertLayer

    return (module for module in model.modules() if isinstance(module, ExpertLayer))


@torch.no_grad()
def set_weights(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Sets every parameter of a Megatron model; names and shapes must be the same."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys(), parameters.keys() ^ tensors.keys()
    for name, parameter in parameters.items():
        assert parameter.shape == tensors[name].shape, name
        parameter.copy_(tensors[name])


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Returns Megatron's reduced gradients by name, from the buffers of its DDP."""
    found = ((name, parameter) for name, parameter in model.module.named_parameters() if parameter.requires_grad)
    return {name: parameter.main_grad for name, parameter in found}


def largest_difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> tuple[float, str]:
    """Returns the largest absolute difference over all tensors of `left`, and its tensor's name."""
    worst = (0.0, "")
    for name, tensor in left.items():
        if tensor.numel():
            worst = max(worst, (float((tensor - right[name]).abs().max()), name))
    return worst
