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
    # transformers ignores the last three of these fields and the fields of `training`; DeepSeek's published code reads
    # them.
    must_be={
        "attention_bias": ((False,), "the projections of latent attention have no biases"),
        "scoring_func": (("sigmoid",), "transformers' DeepSeek-V3 has sigmoid scores whatever the field says"),
        "topk_method": (("noaux_tc",), "transformers' DeepSeek-V3 chooses by scores plus bias inside the best groups"),
        "moe_layer_freq": ((1,), "in transformers' DeepSeek-V3 every layer behind the dense ones has experts"),
    },
    training=("aux_loss_alpha", "seq_aux", "ep_size"),
)
