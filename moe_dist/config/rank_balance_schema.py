"""Defines the section `rank_balance`: three methods, off by default, that keep ranks equally busy during a run."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import PositiveInt, Section, Violation, WholeConfig, unmet


class MovingSection(Section):
    """Move experts between the ranks of an EP group. Each rank keeps its number of experts of each group."""

    every: Annotated[int, Field(ge=2)] = 20
    """Number of steps between two decisions. The loads of the first half of these steps select a move, and the loads of the
    second half decide whether it pays."""
    payback_steps: PositiveInt = 100
    """Number of steps within which a move must save more than it costs; otherwise the experts do not move."""
    flops_per_byte: PositiveFloat = 10000.0
    """Number of FLOPs that a rank computes while it sends one byte: FLOP/s of the rank divided by bytes/s of its link."""


class ReplicatingSection(Section):
    """Copy heavily loaded experts to further ranks of an EP group (replicas), in single layers and for a limited time."""

    every: Annotated[int, Field(ge=2)] = 20
    """Number of steps between two decisions. The loads of the first half of these steps select replicas, and the loads of
    the second half decide whether they pay. Until the next decision, replicas must save more than the exchanges of their
    weights cost."""
    slots: PositiveInt = 1
    """Largest number of replicas on a rank in a layer. The replicas' weights occupy memory from forward to backward."""
    flops_per_byte: PositiveFloat = 10000.0
    """Number of FLOPs that a rank computes while it sends one byte: FLOP/s of the rank divided by bytes/s of its link."""


DEALING = (
    ("model.moe.router.needs_global_batch_info", (False,), "a token's experts must not depend on its place"),
    ("model.moe.capacity", (None,), "the tokens of one rank compete for a capacity"),
    ("model.mixture_of_depths", (None,), "the tokens of some ranks compete for a layer"),
    ("model.attention_lora.dropout", (0.0,), "the dropout of an adapter is drawn by a token's place"),
    ("model.moe.experts.dropout", (0.0,), "the dropout of an adapter is drawn by a token's place"),
    ("router_tuning", (None,), "router tuning reads samples, which are not packed"),
)
MOVING = (
    ("model.moe.experts.replicated", (False,), "every rank holds all LoRA experts, so none can move"),
    ("parallel.dispatch.needs_modules", ((),), "the buffers of the dispatcher are made for one placement"),
)
REPLICATING = (
    ("rank_balance.moving", (None,), "both levers would answer the same load"),
    ("model.moe.experts.replicas", (True,), "not all experts can have replicas"),
    ("parallel.dispatch.replicas", (True,), "the dispatcher sends the rows of all layers by one placement"),
    ("parallel.two_batch_overlap", (False,), "weights would be sent between the exchanges of the other half"),
    ("model.moe.router.experts_choose", (False,), "where experts take equally many tokens, none is hot"),
)


class RankBalanceSection(Section):
    """Methods that keep the ranks equally busy during the run. They change losses only by rounding."""

    dealing: bool = False
    """Distribute the sequences of a step over the ranks so that the ranks' expected costs are equal. Attention's cost grows
    with the square of a document's length. The experts' cost depends on modality and on the fraction of null choices. A
    sequence stays in its micro-batch if a balance or z loss is computed per micro-batch
    (loss.balance.scope=micro_batch)."""

    moving: MovingSection | None = None
    """Move experts between ranks during the run (docs/parallelism.md). null: no expert moves."""

    replicating: ReplicatingSection | None = None
    """Copy heavily loaded experts to further ranks during the run (docs/parallelism.md). null: there are no replicas."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        for name, needs in (("dealing", DEALING), ("moving", MOVING), ("replicating", REPLICATING)):
            if getattr(self, name):
                key = f"rank_balance.{name}"
                yield from unmet(config, key, key, needs, instead=f"remove {key}")
