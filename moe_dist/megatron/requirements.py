"""Checks, before the model is built, that a Megatron configuration is compatible with moe_dist's MoE layer."""

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_dist.errors import ConfigError
from moe_dist.megatron.settings import GUIDE, ExpertSettings

# Options of Megatron's router, dispatcher and experts that moe_dist's MoE layer does not support. Each entry has a field,
# the value that the field must have, and the reason or the setting to use instead.
_OFF: tuple[tuple[str, Any, str], ...] = (
    ("moe_router_score_function", "softmax", "weights are a softmax"),
    ("moe_router_pre_softmax", False, "set router.normalise to none in the expert settings instead"),
    ("moe_router_topk_scaling_factor", None, "set router.scale in the expert settings instead"),
    ("moe_router_num_groups", None, "expert groups by modality come from the expert settings"),
    ("moe_router_enable_expert_bias", False, "balance by moe_aux_loss_coeff"),
    ("moe_router_force_load_balancing", False, "routing is never replaced"),
    ("moe_input_jitter_eps", None, "routing has no noise"),
    ("moe_expert_capacity_factor", None, "no token is dropped"),
    ("moe_pad_expert_input_to_capacity", False, "nothing is padded"),
    ("moe_router_padding_for_fp8", False, "nothing is padded"),
    ("moe_router_padding_for_quantization", False, "nothing is padded"),
    ("moe_apply_probs_on_input", False, "weights are applied to the experts' outputs"),
    ("moe_shared_expert_overlap", False, "the overlap belongs to Megatron's dispatcher"),
    ("moe_latent_size", None, "experts work at the hidden size"),
    ("moe_enable_routing_replay", False, "routing is kept by the layer itself where it recomputes"),
    ("overlap_moe_expert_parallel_comm", False, "the overlap belongs to Megatron's dispatcher"),
    ("delay_wgrad_compute", False, "weight gradients come with backward"),
    ("cuda_graph_impl", "none", "split sizes are known on the host"),
    ("mtp_num_layers", None, "multi-token prediction layers are not covered"),
    ("mlp_chunks_for_training", 1, "Megatron drops the mask of a chunk"),
    ("activation_func_clamp_value", None, "experts are plain SwiGLU"),
    ("fp8", None, "experts compute in the parameters' dtype"),
    ("fp4", None, "experts compute in the parameters' dtype"),
    ("add_bias_linear", False, "experts have no bias"),
)
_BALANCE_TYPES = ("global_aux_loss", "none")


def check(config: TransformerConfig, settings: ExpertSettings) -> None:
    """Checks that Megatron's configuration is compatible. Otherwise raises a ConfigError that lists all problems."""
    if problems := [*_parallel_problems(config), *_expert_problems(config, settings), *_option_problems(config)]:
        raise ConfigError(problems, see=GUIDE)


def _parallel_problems(config: TransformerConfig) -> list[str]:
    problems = []
    if (etp := config.expert_tensor_parallel_size) not in (None, 1):
        problems.append(
            f"expert_tensor_parallel_size={etp}: experts cannot be split over ranks; set it to 1 (its default is the "
            "tensor-parallel size), and raise expert_model_parallel_size: expert parallelism uses the ranks of TP x DP"
        )
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        problems.append(
            f"sequence_parallel={config.sequence_parallel} with tensor_model_parallel_size="
            f"{config.tensor_model_parallel_size}: every rank would route the same tokens; set sequence_parallel"
        )
    return problems


def _expert_problems(config: TransformerConfig, settings: ExpertSettings) -> list[str]:
    problems = []
    num_experts = sum(group.num_experts for group in settings.groups.values())
    if config.num_moe_experts != num_experts:
        problems.append(
            f"num_moe_experts={config.num_moe_experts}: the groups of the expert settings have {num_experts} true experts; "
            "make them equal (null experts do not count)"
        )
    if not config.gated_linear_unit or config.activation_func is not F.silu:
        name = getattr(config.activation_func, "__name__", config.activation_func)
        problems.append(
            f"gated_linear_unit={config.gated_linear_unit}, activation_func={name}: experts are SwiGLU; set swiglu "
            "(gated_linear_unit with silu)"
        )
    balance = config.moe_router_load_balancing_type
    if balance not in _BALANCE_TYPES:
        problems.append(
            f"moe_router_load_balancing_type={balance}: the load-balance loss counts over all ranks of a micro-batch; "
            f"set one of {', '.join(_BALANCE_TYPES)}"
        )
    elif balance != "none" and not isinstance(config.moe_aux_loss_coeff, int | float):
        problems.append(f"moe_aux_loss_coeff={config.moe_aux_loss_coeff}: there is one load-balance loss; give one number")
    return problems


def _option_problems(config: TransformerConfig) -> list[str]:
    # The installed Megatron may lack a field. None, False and 0 all mean that the option is off.
    values = [(field, getattr(config, field, off), off, reason) for field, off, reason in _OFF]
    return [
        f"{field}={value}: must be {off}; {why}" for field, value, off, why in values if value != off and (value or off)
    ]
