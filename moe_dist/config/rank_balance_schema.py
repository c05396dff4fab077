"""The section `rank_balance`: levers that keep the ranks equally busy during a run. Each is off by default."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from moe_dist.config.base.section import Section, Violation, WholeConfig


class MovingSection(Section):
    """Move experts between the ranks of an EP group. Each rank keeps its number of experts of each group."""

    every: Annotated[int, Field(ge=2)] = 20
    """Steps between two decisions. A move is chosen by the loads of the first half of these steps, and judged by the loads
    of the second half."""
    payback_steps: PositiveInt = 100
    """A move is refused unless it saves its cost within this number of steps."""
    flops_per_byte: PositiveFloat = 10000.0
    """FLOPs that a rank computes while it sends one byte: its FLOP/s divided by the bytes per second of its link."""


class ReplicatingSection(Section):
    """Give hot experts replicas on further ranks of an EP group, in single layers and for a limited time."""

    every: Annotated[int, Field(ge=2)] = 20
    """Steps between two decisions. Replicas are chosen by the loads of the first half of these steps, and judged by the
    loads of the second half. Replicas are refused unless they would save, in as many further steps, more than the exchanges
    of their weights cost."""
    slots: PositiveInt = 1
    """Most replicas on a rank in a layer. The replicas' weights take memory from forward to backward."""
    flops_per_byte: PositiveFloat = 10000.0
    """FLOPs that a rank computes while it sends one byte: its FLOP/s divided by the bytes per second of its link."""


class RankBalanceSection(Section):
    """Levers that keep the ranks equally busy during the run. The levers change no loss beyond rounding."""

    dealing: bool = False
    """Deal the sequences of a step to the ranks so that the ranks' expected costs are equal: attention by the square of the
    documents' lengths, experts by modality and share of null choices. A sequence stays in its micro-batch if a balance or z
    loss of one micro-batch is on (loss.balance.scope=micro_batch)."""

    moving: MovingSection | None = None
    """Move experts between ranks during the run (docs/parallelism.md). null: no expert moves."""

    replicating: ReplicatingSection | None = None
    """Give hot experts replicas on further ranks during the run (docs/parallelism.md). null: each expert has one slot."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from self._dealing_violations(config) if self.dealing else ()
        yield from self._replicating_violations(config) if self.replicating is not None else ()
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
                problem = f"rank_balance.dealing=true: {reason}, so the deal would change the step; set dealing to false"
                yield Violation(("rank_balance.dealing", key), problem)

    def _replicating_violations(self, config: WholeConfig) -> Iterator[Violation]:
        key, parallel, model = "rank_balance.replicating", config.parallel, config.model
        rules: tuple[tuple[str, bool, str], ...] = (
            ("rank_balance.moving", self.moving is not None, "both levers would answer the same load"),
            (
                "model.moe.experts.kind",
                not model.moe.experts.replicas,
                f"experts of kind={model.moe.experts.kind} have no replicas, only those of kind=ffn",
            ),
            (
                "parallel.dispatch.kind",
                not parallel.dispatch.replicas,
                f"{parallel.dispatch.name} sends the rows of all layers by one placement, without replicas",
            ),
            (
                "parallel.two_batch_overlap",
                parallel.two_batch_overlap,
                "the weights of replicas would be sent between the exchanges of the other half of the batch",
            ),
            (
                "model.moe.router.kind",
                model.moe.router.experts_choose,
                f"with {model.moe.router.name} all experts take equally many tokens, so none is hot",
            ),
        )
        for other, broken, reason in rules:
            if broken:
                yield Violation((key, other), f"{key}: {reason}; set it to null, or change {other}")
