"""The base of the sections of dispatchers. Other code asks for these properties and never for the kind."""

from collections.abc import Iterator
from typing import Any, ClassVar

from moe_dist.config.section import Section, Violation, WholeConfig

KIND = "parallel.dispatch.kind"
FIX = f"or take {KIND}=all_to_all"


class DispatchSection(Section):
    """How rows travel to the ranks of their experts and back."""

    kind: Any

    needs_modules: ClassVar[tuple[str, ...]] = ()  # Python modules that must be installed
    source: ClassVar[str] = ""  # origin of these modules

    @property
    def name(self) -> str:
        """The kind in the form of an override."""
        return f"{KIND}={self.kind}"

    @property
    def node_size(self) -> int | None:
        """Ranks of a node, if EP groups are divided into nodes."""
        return None

    def keywords(self) -> dict[str, Any]:
        """The fields that the dispatcher's constructor takes."""
        return self.model_dump(exclude={"kind"})


class KernelDispatchSection(DispatchSection):
    """A dispatcher by the kernels of another project: bf16 rows on GPUs, in buffers of its own for one number of tokens."""

    kernels: ClassVar[str]

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        parallel, name = config.parallel, self.name
        if config.model.mixture_of_depths is not None:
            problem = (
                f"{name}: its buffers are made for one number of tokens, and with model.mixture_of_depths layers differ in "
                f"it; take {KIND}=all_to_all, or set model.mixture_of_depths to null"
            )
            yield Violation((KIND, "model.mixture_of_depths"), problem)
        if parallel.precision != "bf16":
            problem = f"{name}: rows travel in bf16, but parallel.precision={parallel.precision}; set it to bf16, {FIX}"
            yield Violation((KIND, "parallel.precision"), problem)
        if parallel.device == "cpu":
            problem = f"{name}: its kernels need GPUs, but parallel.device=cpu; set it to cuda, {FIX}"
            yield Violation((KIND, "parallel.device"), problem)
        if parallel.check_exchanges:
            problem = (
                f"{name}: parallel.check_exchanges cannot look into {self.kernels}'s exchanges; set it to false, {FIX}"
            )
            yield Violation((KIND, "parallel.check_exchanges"), problem)
        if parallel.max_receive_rows is not None:
            problem = (
                f"{name}: {self.kernels} makes the receive buffer itself, so that "
                f"parallel.max_receive_rows={parallel.max_receive_rows} cannot be kept; set it to null, {FIX}"
            )
            yield Violation((KIND, "parallel.max_receive_rows"), problem)


def either(values: list[str]) -> str:
    """`2, 4 or 8`."""
    *most, last = values
    return f"{', '.join(most)} or {last}" if most else last
