"""Defines the sections `monitor.profile`, `monitor.trace` and `monitor.compute_map`, which record steps and tokens."""

from collections.abc import Iterator

from pydantic import Field

from moe_dist.config.base.section import Count, PositiveInt, Section, Violation, WholeConfig

MAX_TRACE_ID = 2**15 - 3  # ids are int16; a dropped (token, expert) pair of router column c is stored as -2 - c


class ProfileSection(Section):
    """Record a torch trace and a memory snapshot of some steps."""

    steps: tuple[PositiveInt, PositiveInt] = Field(
        description="First and last profiled step; the first step of a run is 1."
    )
    ranks: tuple[int, ...] = Field(default=(0,), description="Ranks that are profiled. Each of them becomes slower.")

    def violations(self) -> Iterator[Violation]:
        first, last = self.steps
        if first > last:
            problem = f"steps=[{first}, {last}]: the first step must not be after the last; exchange them"
            yield Violation(("steps",), problem)

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        world = config.parallel.ep * config.parallel.edp
        for rank in self.ranks:
            if not 0 <= rank < world:
                problem = (
                    f"monitor.profile.ranks={list(self.ranks)}: rank {rank} does not exist, because the run has {world} "
                    "ranks (parallel.ep x parallel.edp); take ranks below that number"
                )
                yield Violation(("monitor.profile.ranks", "parallel.ep", "parallel.edp"), problem)


class TraceSection(Section):
    """Record the chosen experts of each traced token, in the folder `trace` of the run."""

    every: PositiveInt = Field(default=1, description="Steps between two traced steps.")
    tokens: PositiveInt | None = None
    """Largest number of tokens that each rank traces in a step, beginning with its first sequences. null: all tokens."""
    weights: bool = Field(default=True, description="Also store the weight of each choice.")

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from needs_chosen_experts("monitor.trace", config)
        if config.router_tuning is not None:
            problem = "monitor.trace: router_tuning reads samples, not the stream of sequences; set monitor.trace to null"
            yield Violation(("monitor.trace", "router_tuning"), problem)


class ComputeMapSection(Section):
    """Draw the number of true experts of each held-out token, at each evaluation and at the end."""

    sequences: PositiveInt = Field(default=32, description="Held-out sequences of each source that are routed for it.")
    pictures: Count = Field(default=8, description="Pictures that are drawn, if the data have pictures.")
    lines: Count = Field(default=10, description="Lines of text that are drawn.")

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from needs_chosen_experts("monitor.compute_map", config)


def needs_chosen_experts(key: str, config: WholeConfig, *, off: str = "null") -> Iterator[Violation]:
    """Yields the violations of a section that needs the chosen experts of every token in every layer. `key` is the
    section's key; `off` is the value that turns the section off."""
    for other, problem in untraceable(config):
        yield Violation((key, other), f"{key}: {problem}; set {key} to {off}")


def untraceable(config: WholeConfig) -> Iterator[tuple[str, str]]:
    """Yields (key, reason) for each setting that prevents recording the chosen experts of each token."""
    if config.model.mixture_of_depths is not None:
        problem = "needs the choices of all tokens, and the layers of model.mixture_of_depths route only some"
        yield "model.mixture_of_depths", problem
    columns = sum(g.num_experts + g.num_null + g.num_zero_computation for g in config.model.moe.groups.values())
    if columns > MAX_TRACE_ID:
        problem = (
            f"ids are 16 bits wide, and model.moe.groups has {columns} columns (true, null, identity and constant experts)"
            f"; at most {MAX_TRACE_ID} can be recorded"
        )
        yield "model.moe.groups", problem
