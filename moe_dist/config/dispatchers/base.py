"""The base classes of the sections of dispatchers. Other code reads the properties of a dispatcher's section and never
compares `kind`, so that a new kind of dispatcher needs no change elsewhere."""

from collections.abc import Iterator
from typing import ClassVar

from moe_dist.config.base.section import KindSection, Violation, WholeConfig

KIND = "parallel.dispatch.kind"
FIX = f"or set {KIND}=all_to_all"


class DispatchSection(KindSection):
    """The exchange that brings rows (hidden vectors of tokens) to the ranks of their experts, and the results back."""

    needs_modules: ClassVar[tuple[str, ...]] = ()  # Python modules that must be installed, with dots inside packages
    source: ClassVar[str] = ""  # the project that these modules come from
    static: ClassVar[bool] = False  # whether exchanges have fixed sizes, so that the host never learns the numbers of rows
    each_pair: ClassVar[bool] = False  # whether each (token, expert) pair is a row, and counts are known before routing
    replicas: ClassVar[bool] = False  # whether all plans come from its attribute `planner`, which replicas replace

    @property
    def name(self) -> str:
        """The key and value that select this dispatcher, as on the command line."""
        return f"{KIND}={self.kind}"

    @property
    def node_size(self) -> int | None:
        """Number of ranks of a node; None if the dispatcher does not distinguish nodes."""
        return None


class KernelDispatchSection(DispatchSection):
    """A dispatcher with the GPU kernels of another project, which send rows in bf16 and whose buffers hold a fixed number
    of tokens."""

    kernels: ClassVar[str]

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        parallel = config.parallel
        if parallel.ep == 1:
            problem = f"{self.name}: there is no other rank with parallel.ep=1; raise parallel.ep, {FIX}"
            yield Violation((KIND, "parallel.ep"), problem)
        rules: tuple[tuple[bool, str, str], ...] = (
            (
                config.model.mixture_of_depths is not None,
                "model.mixture_of_depths",
                "its buffers have room for one number of tokens, and with model.mixture_of_depths this number differs "
                f"between layers; set {KIND}=all_to_all, or model.mixture_of_depths to null",
            ),
            (
                parallel.precision != "bf16",
                "parallel.precision",
                f"rows are sent in bf16, but parallel.precision={parallel.precision}; set it to bf16, {FIX}",
            ),
            (
                parallel.device == "cpu",
                "parallel.device",
                f"its kernels need GPUs, but parallel.device=cpu; set it to cuda, {FIX}",
            ),
            (
                parallel.check_exchanges,
                "parallel.check_exchanges",
                f"parallel.check_exchanges cannot see the rows that {self.kernels} sends; set it to false, {FIX}",
            ),
            (
                parallel.max_receive_rows is not None,
                "parallel.max_receive_rows",
                f"{self.kernels} allocates the receive buffer itself, so that "
                f"parallel.max_receive_rows={parallel.max_receive_rows} cannot bound it; set it to null, {FIX}",
            ),
        )
        for broken, key, problem in rules:
            if broken:
                yield Violation((KIND, key), f"{self.name}: {problem}")


def either(values: list[str]) -> str:
    """Joins values for an error text, as in `2, 4 or 8`."""
    *most, last = values
    return f"{', '.join(most)} or {last}" if most else last
