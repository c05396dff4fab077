from collections.abc import Iterator
from typing import Literal

from moe_dist.config.base.section import Violation, WholeConfig
from moe_dist.config.dispatchers.base import FIX, KIND, KernelDispatchSection


class HybridEPDispatchSection(KernelDispatchSection):
    """Use the kernels of HybridEP. Needs the package deep_ep from DeepEP's branch hybrid-ep."""

    builds = "moe_dist.moe.dispatch.hybrid_ep:HybridEPDispatcher"
    # HybridEP's extension is the separate module hybrid_ep_cpp, which DeepEP's main branch lacks.
    needs_modules = ("deep_ep", "hybrid_ep_cpp")
    source = "DeepEP from the branch hybrid-ep of its repository"

    kind: Literal["hybrid_ep"] = "hybrid_ep"

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        train, width = config.train, config.model.hidden_dim
        tokens = train.micro_batch * config.data.seq_len
        if tokens % 4:  # TMA copies only multiples of 16 bytes
            problem = (
                f"{self.name}: a rank's tokens must be a multiple of 4, but train.micro_batch={train.micro_batch} times "
                f"data.seq_len={config.data.seq_len} is {tokens}; change either, {FIX}"
            )
            yield Violation((KIND, "train.micro_batch", "data.seq_len"), problem)
        if width % 16:
            problem = f"{self.name}: model.hidden_dim={width} must be a multiple of 16; change it, {FIX}"
            yield Violation((KIND, "model.hidden_dim"), problem)
