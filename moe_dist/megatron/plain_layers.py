"""Arguments for Megatron's TransformerConfig that select SwiGLU layers without biases, dropout or Apex kernels."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

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
