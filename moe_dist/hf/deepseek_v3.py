"""DeepSeek-V3: multi-head latent attention, and GLM-4.5's router, shared expert and dense first layers with other
defaults."""

from dataclasses import replace

from moe_dist.hf import glm4_moe
from moe_dist.hf.family import SILENT
from moe_dist.hf.head_fields import LatentHeads

FAMILY = replace(
    glm4_moe.FAMILY,
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    router=glm4_moe.SigmoidRouter(n_group=8, topk_group=4, scale=2.5),
    qk_norm=SILENT,
    biases=SILENT,
    layers=glm4_moe.DenseFirst(first=3),
    heads=LatentHeads(),
    rope_pairs={"adjacent": {"rope_interleave": True}, "halves": {"rope_interleave": False}},
    must_be={"attention_bias": ((False,), "the projections of latent attention have no biases")},
)
