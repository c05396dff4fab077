"""Our transformer and Megatron's GPTModel with the same weights: builds both, and says which tensor is which.

The mapping is the same for weights and for gradients, since each of Megatron's parameters is a rearrangement of ours.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.megatron.plain_layers import PLAIN
from moe_dist.megatron.settings import ExpertSettings
from moe_dist.model.layers import ModelArgs, RMSNorm, SwiGLU
from moe_dist.model.transformer import Transformer
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.losses import ColumnTables, balance_terms, z_terms
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertPlacement

HIDDEN_DIM, NUM_HEADS, KV_HEADS, VOCAB_SIZE, SEQ_LEN, LAYERS = 16, 4, 2, 64, 12, 4
SHARED_FFN_DIM, DENSE_FFN_DIM, EPS, STD = 8, 20, 1e-5, 0.3
MOE_LAYERS = (1, 3)  # the others are dense
BALANCE, Z = 0.02, 1e-3

TWO_GROUPS = {
    "groups": {
        "text": {"num_experts": 5, "num_null": 3, "top_k": 3, "ffn_dim": 6},
        "image": {"num_experts": 3, "num_null": 2, "top_k": 2, "ffn_dim": 10},
    }
}
ONE_GROUP = {"groups": {"all": {"num_experts": 8, "top_k": 2, "ffn_dim": 6}}}


def settings_of(values: Mapping[str, Any], ep: int, *, uneven: bool = False) -> ExpertSettings:
    """Settings with the experts interleaved, or uneven: the first rank has all but three, the last (of four) has none."""
    settings = ExpertSettings.model_validate_json(_json(values))
    if not uneven or ep == 1:
        return settings
    names = [f"{group.name}/{i}" for group in settings.expert_groups() for i in range(group.num_experts)]
    slots: list[list[str]] = [[] for _ in range(ep)]
    for i, name in enumerate(names):
        slots[0 if i < len(names) - 3 else 1 + i % max(1, ep - 2)].append(name)
    return ExpertSettings.model_validate_json(_json({**values, "placement": {"policy": "explicit", "slots": slots}}))


def _json(values: Mapping[str, Any]) -> str:
    import json

    return json.dumps(values)


@dataclass(frozen=True)
class Layout:
    """How Megatron's ranks are arranged, and what the experts are."""

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
        return settings_of(self.values, self.ep, uneven=self.uneven)


def transformer_config(layout: Layout) -> Any:
    """Megatron's TransformerConfig of the shared sizes."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts = sum(group.num_experts for group in layout.settings.groups.values())
    options: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN_DIM,
        "num_attention_heads": NUM_HEADS,
        "num_query_groups": KV_HEADS,
        "ffn_hidden_size": DENSE_FFN_DIM,
        "num_moe_experts": experts,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 6,
        "moe_layer_freq": [int(layer in MOE_LAYERS) for layer in range(LAYERS)],
        "moe_shared_expert_intermediate_size": SHARED_FFN_DIM,
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": BALANCE if layout.aux else 0.0,
        "moe_z_loss_coeff": Z if layout.aux else None,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": 1,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "sequence_parallel": layout.tp > 1,
        "pipeline_dtype": torch.float32,
        "normalization": "RMSNorm",
        "layernorm_epsilon": EPS,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "init_method_std": STD,
        **PLAIN,
        "params_dtype": torch.float32,
    }
    return TransformerConfig(**{**options, **layout.options})


def gpt_model(config: Any, spec: Any, *, pre_process: bool = True, post_process: bool = True) -> Any:
    """Megatron's GPTModel over a layer spec."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQ_LEN,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


class SequenceParallelNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradient is a part, to be summed over TP: Megatron has none without Transformer Engine or Apex."""

    def __init__(self, config: Any, hidden_size: int, eps: float = EPS, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = True  # pyright: ignore[reportAttributeAccessIssue]


def decoder_spec(layout: Layout, config: Any, *, stage: int = 0) -> Any:
    """The spec of our decoder layers; under sequence parallelism a block of them with norms of `SequenceParallelNorm`."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from moe_dist.megatron import decoder_layer_spec

    spec = decoder_layer_spec(layout.settings)
    if layout.tp == 1:
        return spec
    stock: Any = get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization="RMSNorm")
    layers = []
    for layer in stage_layers(layout, stage):
        norms = {"input_layernorm": SequenceParallelNorm, "pre_mlp_layernorm": SequenceParallelNorm}
        layers.append(ModuleSpec(spec.module, spec.params, replace(stock[layer].submodules, **norms)))
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=SequenceParallelNorm)


def stage_layers(layout: Layout, stage: int) -> range:
    """Layers of a pipeline stage."""
    each = LAYERS // layout.pp
    return range(stage * each, (stage + 1) * each)


def our_model(settings: ExpertSettings, *, seed: int = 3) -> Transformer:
    """Our transformer on one rank, with weights drawn from `seed`."""
    placement, wire = settings.model_copy(update={"placement": _interleaved()}).place(1), AllToAll(None, CommStats())

    def make_moe(_: int) -> MoELayer:
        return MoELayer(
            norm=RMSNorm(HIDDEN_DIM, EPS),
            router=TopKRouter(HIDDEN_DIM, placement.groups),
            experts=Experts(HIDDEN_DIM, placement.groups, [group.num_experts for group in placement.groups]),
            dispatcher=AllToAllDispatcher(placement, wire),
            shared=SwiGLU(HIDDEN_DIM, SHARED_FFN_DIM),
        )

    args = ModelArgs(
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
    model = Transformer(args, make_moe)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, STD, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model


def _interleaved() -> Any:
    from moe_dist.config.parallel.section import InterleavedSection

    return InterleavedSection()


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of made-up tokens: ids, next tokens, modality ids (-1 for padding)."""

    tokens_BS: Tensor
    labels_BS: Tensor
    modality_BS: Tensor

    def part(self, first: int, count: int) -> "TokenBatch":
        return TokenBatch(*(each[first : first + count] for each in (self.tokens_BS, self.labels_BS, self.modality_BS)))

    @property
    def positions(self) -> Tensor:
        """[B, S]."""
        return torch.arange(SEQ_LEN).expand(self.tokens_BS.shape)


def batch_of(count: int, settings: ExpertSettings, *, seed: int = 5) -> TokenBatch:
    """Sequence 0 is all of the first modality, 1 all of the last, the rest mixed; a few tokens are padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB_SIZE, (count, SEQ_LEN), generator=generator)
    labels = torch.randint(0, VOCAB_SIZE, (count, SEQ_LEN), generator=generator)
    modalities = len(settings.group_of_modality())
    modality = torch.randint(0, modalities, (count, SEQ_LEN), generator=generator)
    modality[0], modality[1 % count] = 0, modalities - 1
    modality[-1, -2:] = -1
    return TokenBatch(tokens, labels, modality)


def causal_mask() -> Tensor:
    """Megatron's mask: true where a query must not see a key."""
    return ~torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()[None, None]


def our_loss(
    model: Transformer, batch: TokenBatch, settings: ExpertSettings, *, aux: bool, masked: bool = False
) -> tuple[Tensor, Tensor]:
    """The oracle: mean cross entropy over all tokens (masked: that are no padding) plus the aux terms, and the logits."""
    groups = torch.tensor([*settings.group_of_modality(), -1])[batch.modality_BS]
    logits, reports = model(batch.tokens_BS, batch.positions, torch.zeros_like(batch.tokens_BS), groups)
    labels = batch.labels_BS.masked_fill(batch.modality_BS < 0, -100) if masked else batch.labels_BS
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    tables = ColumnTables.on(settings.expert_groups(), torch.device("cpu"))
    for report in reports if aux else ():
        counts = report.counts
        loss = loss + BALANCE * balance_terms(report.aux.prob_LC, counts.choices_LC, counts.tokens_LG, tables).sum()
        loss = loss + Z * z_terms(report.aux.log_z_squared_LG, report.counts.tokens_LG).sum()
    return loss, logits


def aux_values(model: Transformer, batch: TokenBatch, settings: ExpertSettings) -> dict[str, list[float]]:
    """The aux terms of each MoE layer, coefficient 1."""
    groups = torch.tensor([*settings.group_of_modality(), -1])[batch.modality_BS]
    _, reports = model(batch.tokens_BS, batch.positions, torch.zeros_like(batch.tokens_BS), groups)
    tables = ColumnTables.on(settings.expert_groups(), torch.device("cpu"))
    values: dict[str, list[float]] = {"global_load_balancing_loss": [], "z_loss": []}
    for report in reports:
        balance = balance_terms(report.aux.prob_LC, report.counts.choices_LC, report.counts.tokens_LG, tables).sum()
        values["global_load_balancing_loss"].append(float(balance))
        values["z_loss"].append(float(z_terms(report.aux.log_z_squared_LG, report.counts.tokens_LG).sum()))
    return values


# --- which tensor is which


def megatron_tensors(
    ours: Mapping[str, Tensor],
    placement: ExpertPlacement,
    *,
    ep_rank: int,
    tp_rank: int = 0,
    tp_size: int = 1,
    layers: Sequence[int] = range(LAYERS),
) -> dict[str, Tensor]:
    """Our tensors (weights or gradients, by our names) as the parameters of one Megatron rank, by its names.

    Args:
        layers: Layers of this pipeline stage; Megatron numbers them from 0 on each.
    """

    def split(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(tp_size, dim)[tp_rank]

    named: dict[str, Tensor] = {}
    if layers[0] == 0:
        named["embedding.word_embeddings.weight"] = split(ours["embedding.weight"], 0)
    if layers[-1] == LAYERS - 1:
        named["decoder.final_layernorm.weight"] = ours["norm.weight"]
        named["output_layer.weight"] = split(ours["output.weight"], 0)
    for at, layer in enumerate(layers):
        theirs = f"decoder.layers.{at}."
        mine = {key.removeprefix(f"layers.{layer}."): t for key, t in ours.items() if key.startswith(f"layers.{layer}.")}
        named[f"{theirs}input_layernorm.weight"] = mine["attention.norm.weight"]
        named[f"{theirs}self_attention.linear_qkv.weight"] = split(_qkv(mine), 0)
        named[f"{theirs}self_attention.linear_proj.weight"] = split(mine["attention.o.weight"], 1)
        if layer in MOE_LAYERS:
            named[f"{theirs}pre_mlp_layernorm.weight"] = mine["moe.norm.weight"]
            for key, tensor in mine.items():
                if key.startswith("moe.router."):
                    named[f"{theirs}mlp.{key}"] = tensor
            named.update(_experts(mine, placement, ep_rank, theirs))
            gate, up = (split(mine[f"moe.shared.{name}.weight"], 0) for name in ("gate", "up"))
            named[f"{theirs}mlp.moe.shared.linear_fc1.weight"] = torch.cat([gate, up])
            named[f"{theirs}mlp.moe.shared.linear_fc2.weight"] = split(mine["moe.shared.down.weight"], 1)
        else:
            named[f"{theirs}pre_mlp_layernorm.weight"] = mine["ffn.norm.weight"]
            gate, up = (split(mine[f"ffn.{name}.weight"], 0) for name in ("gate", "up"))
            named[f"{theirs}mlp.linear_fc1.weight"] = torch.cat([gate, up])
            named[f"{theirs}mlp.linear_fc2.weight"] = split(mine["ffn.down.weight"], 1)
    return named


def _qkv(mine: Mapping[str, Tensor]) -> Tensor:
    """Megatron interleaves queries, keys and values by query group."""
    parts = [mine[f"attention.{name}.weight"].reshape(KV_HEADS, -1, HIDDEN_DIM) for name in "qkv"]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _experts(mine: Mapping[str, Tensor], placement: ExpertPlacement, ep_rank: int, theirs: str) -> dict[str, Tensor]:
    named = {}
    for group in placement.groups:
        local = [expert - group.first_expert for expert in placement.local_experts(ep_rank, group)]
        for name in ("gate", "up", "down"):
            key = f"moe.experts.{group_module(group.name)}.{name}"
            named[f"{theirs}mlp.{key}"] = mine[key][local]
    return named


def with_layers_of(model: Any) -> Iterator[Any]:
    """The ExpertLayers of a Megatron model, in order."""
    from moe_dist.megatron.expert_layer import ExpertLayer

    return (module for module in model.modules() if isinstance(module, ExpertLayer))


@torch.no_grad()
def set_weights(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Sets every parameter of a Megatron model; names and shapes must agree exactly."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys(), parameters.keys() ^ tensors.keys()
    for name, parameter in parameters.items():
        assert parameter.shape == tensors[name].shape, name
        parameter.copy_(tensors[name])


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Megatron's reduced gradients by name, from its DDP's buffers."""
    return {name: parameter.main_grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def largest_difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> tuple[float, str]:
    """Largest absolute difference over all tensors of `left`, and where it is."""
    worst = (0.0, "")
    for name, tensor in left.items():
        if tensor.numel():
            worst = max(worst, (float((tensor - right[name]).abs().max()), name))
    return worst
