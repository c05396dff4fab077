from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from moe_dist.config.base.section import Violation, WholeConfig
from moe_dist.config.dispatchers.base import FIX, KIND, DispatchSection


class StaticDispatchSection(DispatchSection):
    """Send rows in exchanges of fixed sizes, padded, without a host sync. More rows than the fixed sizes allow end the
    run."""

    builds = "moe_dist.moe.dispatch.static:StaticDispatcher"
    static = True

    kind: Literal["static"] = "static"
    room: float = Field(default=1.5, ge=1.0, allow_inf_nan=False)
    """Number of rows and of (token, expert) pairs for which each rank has room, as a multiple of the number under even
    loads: all modalities have equally many tokens, and all experts of a group take equally many tokens."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        parallel, model = config.parallel, config.model
        router, experts = model.moe.router, model.moe.experts
        product = parallel.device != "cpu" and (parallel.precision != "bf16" or parallel.expert_gemm == "loop")
        rules: tuple[tuple[bool, str, str], ...] = (
            (
                router.experts_choose or not router.fixed_choices,
                "model.moe.router.kind",
                f"needs top_k choices of each token, but with {router.name} any number of experts may take a token; set "
                f"{KIND}=all_to_all",
            ),
            (
                model.mixture_of_depths is not None,
                "model.mixture_of_depths",
                "the room is for one number of tokens, and with model.mixture_of_depths this number differs between "
                f"layers; set model.mixture_of_depths to null, {FIX}",
            ),
            (
                not experts.static,
                "model.moe.experts.kind",
                f"model.moe.experts.kind={experts.kind} computes numbers of rows that the host knows; {FIX[3:]}",
            ),
            (
                parallel.expert_pair_budget is not None,
                "parallel.expert_pair_budget",
                f"parallel.expert_pair_budget={parallel.expert_pair_budget} cuts pairs by numbers that the host does not "
                f"know; set it to null, {FIX}",
            ),
            (
                parallel.max_receive_rows is not None,
                "parallel.max_receive_rows",
                f"parallel.max_receive_rows={parallel.max_receive_rows}: {KIND.removesuffix('kind')}room bounds the rows "
                f"already; set it to null, {FIX}",
            ),
            (
                product,
                "parallel.expert_gemm",
                "without the number of rows on the host, experts need the grouped product, which on CUDA takes bf16 alone, "
                f"but parallel.precision={parallel.precision} and parallel.expert_gemm={parallel.expert_gemm}; set them to "
                f"bf16 and auto, {FIX}",
            ),
        )
        for broken, key, problem in rules:
            if broken:
                yield Violation((KIND, key), f"{self.name}: {problem}")
