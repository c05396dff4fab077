"""Defines a Megatron transformer layer with the experts of moe_dist, and its spec.

    python pretrain_gpt.py --spec moe_dist.megatron.decoder_layer decoder_layer ...     (docs/megatron.md)
    GPTModel(config, transformer_layer_spec=decoder_layer_spec(settings), ...)

Attention, norms and dense layers come from Megatron's specs. Megatron's moe_layer_freq selects the layers with experts.
"""

import copy
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from moe_dist.megatron.expert_layer import ExpertLayer
from moe_dist.megatron.layer_watch import LayerWatch
from moe_dist.megatron.requirements import check
from moe_dist.megatron.settings import ExpertSettings, settings_from_environment
from moe_dist.megatron.versions import shared_expert_module


class DecoderLayer(TransformerLayer):
    """Megatron's TransformerLayer, in which `ExpertLayer` replaces Megatron's MoE layer.

    Args:
        submodules: The submodules of the layer's spec. None uses the submodules of Megatron's decoder spec.
        settings: Expert settings. None reads the file that the variable MOE_DIST_EXPERTS names.
        options: Further arguments of Megatron's layer. Arguments that this list does not explain are Megatron's, too.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules | None = None,
        layer_number: int = 1,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        settings: ExpertSettings | None = None,
        watch: LayerWatch | None = None,
        **options: Any,
    ) -> None:
        settings = settings or settings_from_environment()
        check(config, settings)  # checked first, so that one error message reports all problems
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        offset = get_transformer_layer_offset(config, vp_stage, groups.pp.rank())
        number = layer_number + (offset if options.get("add_layer_offset", True) else 0)
        parts = copy.copy(submodules or _megatrons_own(config, number))  # copied, because all layers share one spec
        every = config.moe_layer_freq
        holds_experts = (number - 1) % every == 0 if isinstance(every, int) else bool(every[number - 1])
        stock = parts.mlp
        if holds_experts:
            parts.mlp = IdentityOp  # replaced below, because Megatron passes process groups only to its own MoE layer
        super().__init__(config, parts, layer_number, pg_collection=groups, vp_stage=vp_stage, **options)
        if holds_experts:
            self.recompute_mlp = False  # to Megatron this is a dense layer; `ExpertLayer` itself recomputes
            shared = None
            if config.moe_shared_expert_intermediate_size is not None:
                gate = config.moe_shared_expert_gate
                shared = shared_expert_module(stock, config=config, pg_collection=groups, gate=gate)
            number = self.layer_number
            self.mlp = ExpertLayer(config, settings, pg_collection=groups, layer_number=number, shared=shared, watch=watch)


def decoder_layer_spec(settings: ExpertSettings) -> ModuleSpec:
    """Returns the spec of a layer with the experts in `settings`, for GPTModel's argument `transformer_layer_spec`."""
    return ModuleSpec(module=DecoderLayer, params={"settings": settings})


# --spec imports this object without calling it. Each layer therefore reads its settings from the environment.
decoder_layer = ModuleSpec(module=DecoderLayer)


def _megatrons_own(config: TransformerConfig, number: int) -> TransformerLayerSubmodules:
    """Returns the submodules of one layer from Megatron's decoder spec."""
    use_te = config.transformer_impl == "transformer_engine"
    specs: Any = get_gpt_decoder_layer_specs(config, use_transformer_engine=use_te, normalization=config.normalization)
    return specs[number - 1].submodules
