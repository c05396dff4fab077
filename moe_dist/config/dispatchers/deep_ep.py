from collections.abc import Iterator
from typing import ClassVar, Literal

from moe_dist.config.dispatchers.base import FIX, KIND, KernelDispatchSection, either
from moe_dist.config.section import Violation, WholeConfig

SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)  # numbers of ranks for which DeepEP has kernel settings


class DeepEPDispatchSection(KernelDispatchSection):
    """Use DeepEP's kernels; needs the package deep_ep."""

    kernels: ClassVar[str] = "DeepEP"
    needs_modules: ClassVar[tuple[str, ...]] = ("deep_ep",)
    source: ClassVar[str] = "DeepEP from its repository"

    kind: Literal["deep_ep"] = "deep_ep"

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        ep, router = config.parallel.ep, config.model.moe.router
        if ep not in SIZES:
            sizes = either([*map(str, SIZES)])
            problem = f"{self.name}: DeepEP has no settings for parallel.ep={ep} ranks; take {sizes}, {FIX}"
            yield Violation((KIND, "parallel.ep"), problem)
        if not router.fixed_choices:
            problem = (
                f"{self.name}: needs top_k choices of each token, but with {router.name} any number of experts may take a "
                f"token; set {KIND}=all_to_all"
            )
            yield Violation((KIND, "model.moe.router.kind"), problem)
