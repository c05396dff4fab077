"""Defines the base classes of the dispatchers' sections. Other code only reads the properties of a section and never
compares its `kind`. So a new kind of dispatcher needs no change elsewhere."""

from collections.abc import Iterator
from typing import ClassVar

from moe_dist.config.base.section import KindSection, Need, Violation, WholeConfig, unmet

KIND = "parallel.dispatch.kind"
FIX = f"or set {KIND}=all_to_all"


class DispatchSection(KindSection):
    """The exchange that sends rows (hidden vectors of tokens) to the ranks of their experts, and the results back."""

    needs_modules: ClassVar[tuple[str, ...]] = ()  # dotted names of the Python modules that the dispatcher needs
    source: ClassVar[str] = ""  # the project that provides these modules
    static: ClassVar[bool] = False  # whether exchanges have fixed sizes and the host never learns the numbers of rows
    needs: ClassVar[tuple[Need, ...]] = ()  # values that the dispatcher needs in other keys of the configuration
    each_pair: ClassVar[bool] = False  # whether each (token, expert) pair is a row; counts are then known before routing
    replicas: ClassVar[bool] = False  # whether the dispatcher works with replicas: its attribute `planner` makes all plans

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from unmet(config, KIND, self.name, self.needs, instead=FIX[3:])

    @property
    def name(self) -> str:
        """The setting that selects this dispatcher, as on the command line."""
        return f"{KIND}={self.kind}"

    @property
    def node_size(self) -> int | None:
        """Number of ranks of a node; None if the dispatcher does not distinguish nodes."""
        return None


class KernelDispatchSection(DispatchSection):
    """A dispatcher with another project's GPU kernels. They send rows in bf16, and their buffers have fixed sizes."""

    needs = (
        ("model.mixture_of_depths", (None,), "its buffers have room for the same number of tokens in each layer"),
        ("parallel.precision", ("bf16",), "rows are sent in bf16"),
        ("parallel.device", ("cuda", "auto"), "its kernels need GPUs"),
        ("parallel.max_receive_rows", (None,), "its kernels allocate the receive buffer themselves"),
    )

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        if config.parallel.ep == 1:
            problem = f"{self.name}: there is no other rank with parallel.ep=1; raise parallel.ep, {FIX}"
            yield Violation((KIND, "parallel.ep"), problem)


def either(values: list[str]) -> str:
    """Joins values to a text such as `2, 4 or 8`."""
    *most, last = values
    return f"{', '.join(most)} or {last}" if most else last
