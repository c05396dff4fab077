"""The section `rank_balance`: levers that keep the ranks equally busy during a run. Each is off by default."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from moe_dist.config.section import Section, Violation, WholeConfig


class MovingSection(Section):
    """Move experts between the ranks of an EP group. Each rank keeps its number of experts of each group."""

    every: Annotated[int, Field(ge=2)] = 20
    """Steps between two decisions. The loads of the first half of these steps find a move, those of the second half judge
    it."""
    payback_steps: PositiveInt = 100
    """A move that does not save its cost in so many steps is refused."""
    flops_per_byte: PositiveFloat = 10000.0
    """FLOPs that a rank computes in the time in which it sends a byte of a moved expert: FLOP/s over bytes per second."""


class RankBalanceSection(Section):
    """Levers that keep the ranks equally busy during the run. They change no loss beyond rounding."""

    dealing: bool = False
    """Deal the sequences of a step to the ranks so that their expected costs are equal: attention by the square of the
    documents' lengths, experts by modality and share of null choices. A sequence stays in its micro-batch if a balance or z
    loss is on, whose statistic is of one micro-batch."""

    moving: MovingSection | None = None
    """Move experts between ranks during the run (docs/parallelism.md). null: no expert moves."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from self._dealing_violations(config) if self.dealing else ()
        key = "rank_balance.moving"
        if self.moving is not None and config.model.moe.experts.replicated:
            problem = f"{key}: every rank holds all LoRA experts, so none can move; set it to null"
            yield Violation((key, "model.moe.experts.kind"), problem)
        kind = config.parallel.dispatch.kind
        if self.moving is not None and config.parallel.dispatch.needs_modules:
            problem = f"{key}: the buffers of parallel.dispatch.kind={kind} are made for one placement; set it to null"
            yield Violation((key, "parallel.dispatch.kind"), problem)

    def _dealing_violations(self, config: WholeConfig) -> Iterator[Violation]:
        model = config.model
        for key, off, reason in (
            ("model.moe.router.kind", model.moe.router.needs_global_batch_info, "a token's experts depend on its place"),
            ("model.moe.capacity", model.moe.capacity is not None, "the tokens of one rank compete for a capacity"),
            ("model.mixture_of_depths", model.mixture_of_depths is not None, "the tokens of some ranks compete"),
            ("model", model.largest_dropout > 0.0, "the dropout of an adapter draws by a token's place"),
            ("router_tuning", config.router_tuning is not None, "router tuning reads samples, which are not packed"),
        ):
            if off:
                problem = f"rank_balance.dealing=true: {reason}, so another deal is another step; set dealing to false"
                yield Violation(("rank_balance.dealing", key), problem)
