from collections.abc import Iterator
from typing import Literal

from moe_dist.config.base.section import Violation, WholeConfig
from moe_dist.config.dispatchers.base import FIX, KIND, KernelDispatchSection

WIDTH = 256  # in DeepEP's combine, each of the 32 threads of a warp reads 16 bytes of a row
MOST_CHOICES = 32  # DeepEP uses one thread of a warp for each choice of a token


class DeepEPV2DispatchSection(KernelDispatchSection):
    """Use the kernels of DeepEP V2 (ElasticBuffer). Needs the package deep_ep."""

    builds = "moe_dist.moe.dispatch.deep_ep_v2:DeepEPDispatcher"
    # DeepEP V1 lacks this module.
    needs_modules = ("deep_ep.buffers.elastic",)
    source = "DeepEP V2 from the main branch of its repository"

    kind: Literal["deep_ep_v2"] = "deep_ep_v2"

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        router, width = config.model.moe.router, config.model.hidden_dim
        if width % WIDTH:
            problem = f"{self.name}: model.hidden_dim={width} must be a multiple of {WIDTH}; change it, {FIX}"
            yield Violation((KIND, "model.hidden_dim"), problem)
        if not router.fixed_choices:
            problem = (
                f"{self.name}: needs top_k choices of each token, but with {router.name} any number of experts may take a "
                f"token; set {KIND}=all_to_all"
            )
            yield Violation((KIND, "model.moe.router.kind"), problem)
        for name, group in config.model.moe.groups.items():
            key = f"model.moe.groups.{name}.top_k"
            if group.top_k > MOST_CHOICES:
                problem = f"{self.name}: {key}={group.top_k} must be at most {MOST_CHOICES}; lower it, {FIX}"
                yield Violation((KIND, key), problem)
