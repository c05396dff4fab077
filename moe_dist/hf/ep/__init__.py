"""Expert parallelism for transformers' own mixture-of-experts models, by moe_dist's dispatcher.

    import moe_dist.hf.ep  # registers "moe_dist"

    parallel = DistributedConfig(fsdp_size=4, ep_size=4, ep_implementation="moe_dist")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=parallel)

The import also registers the parallel style "moe_dist_shard", for experts whose number the ranks do not divide.
Needs transformers 5.24 or newer. Only this package and `moe_dist.hf.host` import transformers.
"""

try:
    from transformers.distributed.expert_parallel import EPImplementationInterface
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
except ImportError as error:
    raise ImportError("moe_dist.hf.ep needs transformers 5.24 or newer: pip install 'transformers>=5.24'") from error

from moe_dist.hf.ep.implementation import ChunkedExperts, MoeDistEP, allow_absent_choices

__all__ = ["ChunkedExperts", "MoeDistEP", "allow_absent_choices"]

EPImplementationInterface.register("moe_dist", MoeDistEP)
ALL_PARALLEL_STYLES.register("moe_dist_shard", ChunkedExperts())  # pyright: ignore[reportArgumentType]
