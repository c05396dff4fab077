from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from moe_dist.config.base.section import Violation, WholeConfig
from moe_dist.config.dispatchers.base import FIX, KIND, DispatchSection


class StaticDispatchSection(DispatchSection):
    """Send rows in exchanges of fixed sizes, with padding, without a host sync. The run ends with an error if there are
    more rows than a fixed size allows."""

    builds = "moe_dist.moe.dispatch.static:StaticDispatcher"
    static = True
    needs = (
        ("model.moe.router.fixed_choices", (True,), "each token must have top_k choices"),
        ("model.mixture_of_depths", (None,), "the room is for one number of tokens in all layers"),
        ("model.moe.experts.static", (True,), "the host does not know how many rows experts compute"),
        ("parallel.expert_pair_budget", (None,), "pairs cannot be cut by numbers that the host does not know"),
        ("parallel.max_receive_rows", (None,), "parallel.dispatch.room bounds the rows already"),
    )

    kind: Literal["static"] = "static"
    room: float = Field(default=1.5, ge=1.0, allow_inf_nan=False)
    """Largest number of rows and of (token, expert) pairs that a rank can receive, divided by the number under even loads.
    Under even loads all modalities have equally many tokens, and all experts of a group have equally many tokens."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        parallel = config.parallel
        yield from super().violations_in(config)
        if parallel.device != "cpu" and (parallel.precision != "bf16" or parallel.expert_gemm == "loop"):
            problem = (
                "without the number of rows on the host, experts need the grouped product, which on CUDA takes bf16 alone, "
                f"but parallel.precision={parallel.precision} and parallel.expert_gemm={parallel.expert_gemm}; set them to "
                f"bf16 and auto, {FIX}"
            )
            yield Violation((KIND, "parallel.expert_gemm"), f"{self.name}: {problem}")
