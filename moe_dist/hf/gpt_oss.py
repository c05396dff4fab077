"""gpt-oss: attention sinks, biases of experts and routers, clamped SwiGLU, and sliding windows in every other layer."""

from dataclasses import dataclass
from typing import Any

from moe_dist.config.experts.base import ExpertsSection
from moe_dist.config.experts.clamped_ffn import ClampedFFNExpertsSection
from moe_dist.hf.family import ModelFamily, SoftmaxRouter
from moe_dist.hf.fields import Fields
from moe_dist.hf.head_fields import GroupedHeads


@dataclass(frozen=True)
class _ClampedExperts:
    """The fields of the clamped SwiGLU."""

    def read(self, read: Fields) -> dict[str, Any]:
        form = {"alpha": read.positive("swiglu_alpha", 1.702), "limit": read.positive("swiglu_limit", 7.0)}
        return {"kind": "clamped_ffn", **form}

    def write(self, experts: ExpertsSection) -> dict[str, Any]:
        assert isinstance(experts, ClampedFFNExpertsSection)
        return {"swiglu_alpha": experts.alpha, "swiglu_limit": experts.limit}

    def fits(self, experts: ExpertsSection) -> bool:
        return isinstance(experts, ClampedFFNExpertsSection)


FAMILY = ModelFamily(
    "gpt_oss",
    "GptOssForCausalLM",
    SoftmaxRouter({"true_chosen": {}}, logit_bias=True),
    ("num_local_experts", "num_experts"),
    "intermediate_size",
    biases={"qkvo": {"attention_bias": True}, "none": {"attention_bias": False}},
    form=_ClampedExperts(),
    layout="interleaved",
    heads=GroupedHeads(kind="sinks", kv_heads=8, width=64),
    rope_base=150000.0,
    rope_scaling={
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    windows="alternate",
    gates=("mlp.router.weight",),
)  # fmt: skip
