"""Fixtures of the monitor's tests: groups and placement of a small model, and made-up statistics of its steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from moe_dist.moe.routing.counts import RoutingCounts
from moe_dist.monitor.metrics import Record
from moe_dist.monitor.pictures import Subject
from moe_dist.monitor.sinks.sink import Sink
from moe_dist.monitor.statistics import DepthStatistics, EvaluationResult
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.train.build.training import LoopSettings
from moe_dist.train.loop.record import build_record
from moe_dist.train.objective.loss import AuxSettings
from moe_dist.train.start.resume import Progress
from moe_dist.train.step.result import StepResult

MODALITIES = ("text", "image")


# Layers 1 and 3 use mixture of depths. Of 100 text and 60 image tokens they should compute a quarter.
DEPTHS = DepthStatistics(
    layers=(1, 3),
    token_share=0.25,
    groups=("text", "image"),
    tokens_LG=np.array([[100, 60], [100, 60]]),
    taken_LG=np.array([[10, 30], [36, 4]]),
    agreed_L=np.array([120, 152]),
    weight_L=np.array([16.0, 36.0]),
)


class Statistics(NamedTuple):
    """The result of a step, and the values of the training loop that `LOOP` lists."""

    result: StepResult
    loop: Mapping[str, Any]


LOOP: Mapping[str, Any] = {
    "balance_coefficient": 0.02, "lr": 1e-3, "skipped_steps": 0, "tokens": None, "seconds": 0.5, "epochs": None,
    "flops_per_token": 2e6, "active_target": {}, "levers": (), "weights": None, "readings": None,
    "peak_flops": None, "peak_source": "", "sources": (),
}  # fmt: skip


def record_of(stats: Statistics, placement: ExpertPlacement, modalities: Sequence[str]) -> Record:
    """Makes the record of a step from its statistics."""
    loop, nothing = stats.loop, dict[str, Any]()
    config: Any = None  # a record reads no key of the configuration
    plan = LoopSettings(
        config=config,
        placement=placement,
        modalities=tuple(modalities),
        baselines=nothing,
        lr=lambda _: loop["lr"],
        aux=lambda _: AuxSettings("null_averaged", loop["balance_coefficient"], 0.0),
        flops_per_token=lambda *_: loop["flops_per_token"],
        peak_flops=loop["peak_flops"],
        peak_source=loop["peak_source"],
        active_target={name: lambda _, value=value: value for name, value in loop["active_target"].items()},
    )
    progress = Progress(step=loop["step"], tokens=loop["tokens"], skipped_steps=loop["skipped_steps"])
    options = {name: loop[name] for name in ("seconds", "epochs", "readings", "levers", "weights", "sources")}
    return build_record(stats.result, plan, progress, **options)


MakeStatistics = Callable[..., Statistics]
MakeRecord = Callable[..., Record]


def draw_groups(num_groups: int, num_experts: int, num_null: int, top_k: int) -> tuple[ExpertGroup, ...]:
    names = ("text", "image", *(f"group{i}" for i in range(2, num_groups)))[:num_groups]
    return tuple(
        ExpertGroup(name, num_experts, num_null, top_k, 32 * (g + 1), g * num_experts, (name,))
        for g, name in enumerate(names)
    )


def draw_placement(groups: tuple[ExpertGroup, ...], num_ranks: int) -> ExpertPlacement:
    """Places every num_ranks-th expert on the same rank."""
    total = sum(group.num_experts for group in groups)
    return ExpertPlacement(groups, tuple(tuple(range(rank, total, num_ranks)) for rank in range(num_ranks)))


def draw_statistics(placement: ExpertPlacement, num_layers: int, step: int = 1, **changes: Any) -> Statistics:
    """Draws random choices and returns consistent statistics of a step. `changes` replace fields of the counts, the result
    and the loop; `step_tokens` is the result's field `tokens`."""
    rng = np.random.default_rng(step)
    groups = placement.groups
    tokens_G = rng.integers(50, 100, len(groups))
    true, null = [], []
    for group, tokens in zip(groups, tokens_G, strict=True):
        share = rng.dirichlet(np.ones(group.num_experts + group.num_null), num_layers)
        choices = np.stack([rng.multinomial(tokens * group.top_k, row) for row in share])
        true.append(choices[:, : group.num_experts])
        null.append(choices[:, group.num_experts :])
    choices_LC = np.concatenate(true + null, axis=1).astype(np.int64)
    tokens_LG = np.tile(tokens_G, (num_layers, 1))
    names = [name for group in groups for name in group.modalities]
    counts = RoutingCounts(
        choices_LC=choices_LC,
        tokens_LG=tokens_LG,
        entropy_LG=tokens_LG * 0.7,
        dropped_LE=np.zeros_like(choices_LC[:, : placement.num_experts]),
    )
    result = StepResult(
        nll_M=np.array([100.0 + i for i in range(len(names))]),
        labels_M=np.array([40 + i for i in range(len(names))]), balance=0.02, z=0.001, auxiliary=0.0, grad_norm=0.5,
        skipped=False, tokens=1000,
        counts=counts._replace(**{name: changes.pop(name) for name in RoutingCounts._fields if name in changes}),
        ledger={
            "payload_bytes": 80 * 4 * 128, "metadata_bytes": 640, "rows_remote": 80, "pairs": 200,
            "pairs_remote": 100, "rows_per_pair": 100, "rows_topk": 240, "rows_same_active": 120,
            "rows_null_remapped": 180,
        },
        comm_seconds=0.01, busy_seconds_W=np.zeros(0), memory_W3=np.zeros((0, 3)),
    )  # fmt: skip
    changed = {"tokens": changes.pop("step_tokens", 1000)}
    changed |= {name: changes.pop(name) for name in list(changes) if name not in LOOP}
    usual = {"step": step, "tokens": 1000 * step, "epochs": {name: 0.1 * step for name in names}}
    return Statistics(replace(result, **changed), {**LOOP, **usual, **changes})


@pytest.fixture
def groups() -> tuple[ExpertGroup, ...]:
    return draw_groups(2, num_experts=4, num_null=2, top_k=2)


@pytest.fixture
def placement(groups: tuple[ExpertGroup, ...]) -> ExpertPlacement:
    """Ranks 0 and 1 have two text experts each. Ranks 2 and 3 have two image experts each."""
    return ExpertPlacement(groups, ((0, 1), (2, 3), (4, 5), (6, 7)))


@pytest.fixture
def subject(groups: tuple[ExpertGroup, ...], placement: ExpertPlacement) -> Subject:
    return Subject(groups, placement, (1, 3, 5), len(MODALITIES))


@pytest.fixture
def make_statistics(placement: ExpertPlacement) -> MakeStatistics:
    """Returns statistics of a step of 3 MoE layers. Keywords replace fields."""
    return lambda step=1, **changes: draw_statistics(placement, 3, step, **changes)


@pytest.fixture
def make_record(make_statistics: MakeStatistics, placement: ExpertPlacement) -> MakeRecord:
    """Returns the record of the step that `make_statistics` makes."""

    def make(step: int = 1, **changes: Any) -> Record:
        return record_of(make_statistics(step, **changes), placement, MODALITIES)

    return make


def send(sink: Sink, make_record: MakeRecord) -> None:
    """Sends a text, steps 5 and 6, and an evaluation after step 6. Closes the sink twice."""
    sink.text("placement", "| rank | text |")
    for step in (5, 6):
        sink.step(make_record(step))
    sink.evaluation(EvaluationResult(6, {"text": 3.0}, {"text": 1}), {"eval/text": 3.0, "perf/balance_efficiency": None})
    sink.flush()
    sink.close()
    sink.close()


@pytest.fixture
def wide_record() -> Callable[..., tuple[Record, Subject]]:
    """Returns record and subject of a model with many layers, experts and groups. Keywords replace fields."""

    def make(num_groups: int, num_layers: int, num_experts: int, **changes: Any) -> tuple[Record, Subject]:
        groups = draw_groups(num_groups, num_experts, num_experts // 4, top_k=8)
        placement = draw_placement(groups, num_ranks=8)
        modalities = [group.name for group in groups]
        record = record_of(draw_statistics(placement, num_layers, **changes), placement, modalities)
        return record, Subject(groups, placement, tuple(range(num_layers)), len(modalities))

    return make
