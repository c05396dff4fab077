"""On the same sequences, the engines of Megatron-Core and of moe_dist have the same losses."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_dist.comm.names import BACKWARD, COMBINE_ROWS, DISPATCH_ROWS
from moe_dist.data.batch import Batch
from moe_dist.moe.routing.types import LayerReport
from moe_dist.plan.pipeline_memory import stage_memory
from tests.support.cover import exhaustive, full, full_with_each_version, rest_exhaustive
from tests.support.engine_run import losses, megatron, started_run, take_steps
from tests.support.worlds import RankContext

UNEVEN = [["text/0", "text/1", "image/0"], ["text/2", "image/1"], [], []]  # two ranks without experts
PINNED = {"policy": "pinned", "groups": {"text": {"ranks": [0]}, "image": {"ranks": [1]}}}


def ranks(ep: int, edp: int = 1) -> dict[str, Any]:
    return {"parallel.ep": ep, "parallel.edp": edp}


def explicit(slots: list[list[str]]) -> dict[str, Any]:
    return {"placement": {"policy": "explicit", "slots": slots}}


def close(found: list[dict[str, Any]], expected: list[dict[str, Any]], *, bound: float) -> None:
    for step, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
        assert (theirs["tokens"], theirs["labels"]) == (ours["tokens"], ours["labels"])
        for key in ("loss", "balance", "z"):
            assert theirs[key] == pytest.approx(ours[key], rel=bound), f"{key} of step {step}"
        assert theirs["norm"] == pytest.approx(ours["norm"], rel=10 * bound), f"step {step}"


@pytest.fixture(scope="module")
def own_losses(run_in_world: Callable[..., list[Any]], tiny_data: Path) -> Callable[..., list[dict[str, Any]]]:
    """Returns the steps of moe_dist's engine on this number of ranks; cached."""
    known: dict[str, list[dict[str, Any]]] = {}

    def of(world_size: int, **changes: Any) -> list[dict[str, Any]]:
        key = f"{world_size} {changes}"
        if key not in known:
            layout = {**ranks(1, world_size), **changes}
            known[key] = run_in_world(world_size, losses, str(tiny_data), layout)[0]
        return known[key]

    return of


@pytest.mark.parametrize(
    ("world_size", "changes", "data_ranks"),
    [
        pytest.param(1, {**ranks(1), **megatron()}, 1, id="one rank", marks=pytest.mark.exhaustive),
        pytest.param(2, {**ranks(1, 2), **megatron(tp=2)}, 1, id="tp2", marks=pytest.mark.exhaustive),
        pytest.param(2, {**ranks(1, 2), **megatron(pp=2)}, 1, id="pp2", marks=pytest.mark.exhaustive),
        pytest.param(
            2, {**ranks(1, 2), **megatron(pp=2, vpp=2)}, 1, id="pp2-vpp2", marks=pytest.mark.full,
        ),
        pytest.param(2, {**ranks(2), **megatron(cp=2)}, 1, id="ep2-cp2"),
        pytest.param(2, {**ranks(2), **megatron()}, 2, id="ep2", marks=pytest.mark.exhaustive),
        pytest.param(
            2, {**ranks(2), "placement": PINNED, **megatron(distributed_optimizer=True)}, 2,
            id="pinned-do", marks=pytest.mark.exhaustive,
        ),
        pytest.param(4, {**ranks(2, 2), **megatron(tp=2, pp=2)}, 1, id="tp2-ep2-pp2", marks=pytest.mark.full),
        pytest.param(4, {**ranks(4), **explicit(UNEVEN), **megatron()}, 4, id="uneven", marks=pytest.mark.exhaustive),
        pytest.param(
            4, {**ranks(4), **explicit(UNEVEN), **megatron(tp=2, distributed_optimizer=True)}, 2,
            id="uneven-tp2-do", marks=pytest.mark.exhaustive,
        ),
        pytest.param(4, {**ranks(2, 2), **megatron(tp=2, cp=2)}, 1, id="tp2-cp2", marks=pytest.mark.exhaustive),
        pytest.param(8, {**ranks(2, 4), **megatron(tp=2, pp=2)}, 2, id="8 ranks", marks=pytest.mark.exhaustive),
    ],
)  # fmt: skip
def test_losses_equal_those_of_the_own_engine(
    run_with_megatron: Callable[..., list[Any]],
    own_losses: Callable[..., list[dict[str, Any]]],
    tiny_data: Path,
    world_size: int,
    changes: Mapping[str, Any],
    data_ranks: int,
) -> None:
    expected = own_losses(data_ranks)
    for found in run_with_megatron(world_size, losses, str(tiny_data), changes):
        close(found, expected, bound=1e-5)


ROUTERS = [
    {"kind": "group_limited", "selection_bias": False, "scale": 2.0},
    {"kind": "top_k", "normalise": "true_all", "null_logit": "single"},
    {"kind": "top_k", "logit_bias": True},
]
TARGET = {"text": 1.2, "image": 0.8}
ACTIVE = {"kind": "active_experts", "target": TARGET, "rate": 0.05, "proportional": 0.1, "per": "expert"}
LOSS_FREE = {"kind": "loss_free", "rate": 0.01}
CONTROLLED = {
    "top_p": ({"kind": "top_p"}, [ACTIVE]),
    "relu": ({"kind": "relu"}, [ACTIVE]),
    "threshold": ({"kind": "threshold"}, []),
    "predicted_k": ({"kind": "predicted_k"}, [ACTIVE]),
    "group_limited": ({"kind": "group_limited", "selection_bias": True}, [LOSS_FREE]),
    "top_k": ({"kind": "top_k", "selection_bias": True}, [{**ACTIVE, "per": "group"}, LOSS_FREE]),
}
NO_NULLS = {f"model.moe.groups.{name}.num_null": 0 for name in ("text", "image")}


@pytest.mark.parametrize(
    "router",
    [full_with_each_version(ROUTERS[0]), exhaustive(ROUTERS[1]), exhaustive(ROUTERS[2])],
    ids=["group_limited", "true_all", "logit_bias"],
)
def test_every_router_by_tokens(
    run_with_megatron: Callable[..., list[Any]],
    own_losses: Callable[..., list[dict[str, Any]]],
    tiny_data: Path,
    router: dict[str, Any],
) -> None:
    nulls = NO_NULLS if router.get("logit_bias") else {}
    changes = {"model.moe.router": router, **nulls}
    layout = {**changes, **ranks(2), **megatron(tp=2)}
    close(run_with_megatron(2, losses, str(tiny_data), layout)[0], own_losses(1, **changes), bound=1e-5)


@pytest.mark.parametrize(
    "name", ["top_p", full("top_k"), *map(exhaustive, ("relu", "threshold", "predicted_k", "group_limited"))]
)
def test_selection_biases_follow_the_loads_of_all_ranks(
    run_with_megatron: Callable[..., list[Any]],
    own_losses: Callable[..., list[dict[str, Any]]],
    tiny_data: Path,
    name: str,
) -> None:
    router, balance = CONTROLLED[name]
    changes = {"model.moe.router": router, "model.moe.balance": balance}
    expected = own_losses(1, **changes)
    for found in run_with_megatron(2, losses, str(tiny_data), {**changes, **ranks(1, 2), **megatron(pp=2)}):
        close(found, expected, bound=1e-5)
        assert (found[-1]["choices"] == expected[-1]["choices"]).all()


SCHEDULED = {"kind": "scheduled_top_k", "active_experts": {"text": [1.5, 1.2], "image": [0.8, 1.6]}}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [full(2, {**ranks(2), **megatron(tp=2)}), exhaustive(4, {**ranks(2, 2), **megatron(cp=2, pp=2)})],
    ids=["ep2-tp2", "cp2-pp2"],
)
def test_a_draw_belongs_to_its_token(
    run_with_megatron: Callable[..., list[Any]],
    own_losses: Callable[..., list[dict[str, Any]]],
    tiny_data: Path,
    world_size: int,
    layout: Mapping[str, Any],
) -> None:
    changes = {"model.moe.router": SCHEDULED, **NO_NULLS}
    expected = own_losses(1, **changes)
    found = run_with_megatron(world_size, losses, str(tiny_data), {**changes, **layout})[0]
    close(found, expected, bound=1e-5)
    assert (found[0]["choices"] == expected[0]["choices"]).all()


DISPATCH: dict[str, dict[str, Any]] = {
    "overlap": {"parallel.dispatch": {"kind": "all_to_all", "overlap": True, "chunks": 2}},
    "hierarchical": {"parallel.dispatch": {"kind": "hierarchical", "ranks_per_node": 2}, "parallel.check_exchanges": True},
    "static": {"parallel.dispatch": {"kind": "static", "room": 4.0}},
}


@pytest.mark.parametrize("name", rest_exhaustive(DISPATCH))
def test_other_dispatchers_send_what_they_send_in_the_own_engine(
    run_with_megatron: Callable[..., list[Any]],
    run_in_world: Callable[..., list[Any]],
    tiny_data: Path,
    name: str,
) -> None:
    changes = {"train.steps": 3, **ranks(4), **DISPATCH[name]}
    own = run_in_world(4, losses, str(tiny_data), changes)[0]
    found = run_with_megatron(4, losses, str(tiny_data), {**changes, **megatron()})[0]
    close(found, own, bound=1e-5)
    assert [step["rows"] for step in found] == [step["rows"] for step in own]


CHOICE: Mapping[str, Any] = {
    "model.moe.router": {"kind": "expert_choice", "causal": "threshold", "capacity": 0.6},
    "loss.balance.schedule": [[0, 0.0]],
    "loss.z": 0.0,
    **NO_NULLS,
}


class Choices:
    """Keeps the choices of each micro-batch that a trace would write."""

    own_tokens = False

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def add(self, batch: Batch, reports: Sequence[LayerReport]) -> None:
        tokens = (~batch.padding_BS).flatten()
        for report in reports:
            assert report.chosen is not None
            self.seen.append(tuple(each.numpy() for each in (tokens, *(part[tokens] for part in report.chosen))))

    def finish(self, number: int) -> None: ...


def traced(rank: RankContext, data: str, changes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Returns tokens, columns and weights of a step by micro-batch and layer."""
    watcher: Any = Choices()
    with started_run(rank, data, changes) as run:
        take_steps(run, 0, 1, [watcher])
    return watcher.seen


@pytest.mark.parametrize(
    ("world_size", "layout", "writer", "changes"),
    [
        (4, {**ranks(2, 2), **megatron(tp=2, pp=2)}, 2, {}),
        exhaustive(2, {**ranks(2), **megatron(cp=2)}, 0, {}),
        full(4, {**ranks(2, 2), **megatron(tp=2, pp=2)}, 2, CHOICE),
    ],
    ids=["tp2-pp2", "cp2", "choice"],
)
def test_a_trace_has_every_token_once_with_its_choices(
    run_with_megatron: Callable[..., list[Any]],
    run_in_world: Callable[..., list[Any]],
    tiny_data: Path,
    world_size: int,
    layout: Mapping[str, Any],
    writer: int,
    changes: Mapping[str, Any],
) -> None:
    expected = run_in_world(1, traced, str(tiny_data), {**ranks(1), **changes})[0]
    found = run_with_megatron(world_size, traced, str(tiny_data), {**layout, **changes})
    for rank, seen in enumerate(found):
        for (tokens, column, weight), (own_tokens, own_column, own_weight) in zip(seen, expected, strict=True):
            if rank != writer:
                assert not tokens.any()
                continue
            assert (tokens == own_tokens).all()
            assert (column == own_column).all()
            assert weight == pytest.approx(own_weight, rel=2e-3)  # weights of a trace are float16


def poisoned(rank: RankContext, data: str, changes: Mapping[str, Any]) -> tuple[bool, bool, float]:
    """Takes a step with a NaN weight on one rank, then one without. Returns whether the first was skipped, whether moments
    changed, and the second step's loss."""
    with started_run(rank, data, changes) as run:
        weight = next(run.parameters()).data.flatten()
        before = weight[0].item()
        if rank.rank == rank.world_size - 1:
            weight[0] = float("nan")
        batches = run.loader.batches(0)
        skipped = run.training.step(batches, lr=run.plan.lr(0), aux=run.plan.aux(0), number=0).skipped
        if rank.rank == rank.world_size - 1:
            weight[0] = before
        optimizer: Any = run.training.optimizer
        moved = any(group.get("step") for group in optimizer.param_groups) or any(
            state for each in optimizer.chained_optimizers for state in each.optimizer.state.values()
        )
        return skipped, moved, take_steps(run, 0, 1)[0]["loss"]


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(
    run_with_megatron: Callable[..., list[Any]], own_losses: Callable[..., list[dict[str, Any]]], tiny_data: Path
) -> None:
    expected = own_losses(1)[0]["loss"]
    for skipped, moved, loss in run_with_megatron(2, poisoned, str(tiny_data), {**ranks(1, 2), **megatron(pp=2)}):
        assert skipped
        assert not moved
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", [ranks(2), full({**ranks(4), **explicit(UNEVEN)})], ids=["ep2", "ep4-uneven"])
def test_the_ledger_counts_what_the_own_engine_sends(
    run_with_megatron: Callable[..., list[Any]],
    run_in_world: Callable[..., list[Any]],
    tiny_data: Path,
    layout: dict[str, Any],
) -> None:
    changes, world_size = {**layout, "train.steps": 2}, layout["parallel.ep"]
    own = run_in_world(world_size, losses, str(tiny_data), changes)[0]
    found = run_with_megatron(world_size, losses, str(tiny_data), {**changes, **megatron()})[0]
    for theirs, ours in zip(found, own, strict=True):
        assert theirs["rows"] == ours["rows"]
        assert (theirs["choices"] == ours["choices"]).all()
        assert ours["rows"]["payload_bytes"] > 0


def tracked(rank: RankContext, data: str, changes: Mapping[str, Any]) -> set[str]:
    """Returns the collectives of a step that the watchdog tracks."""
    seen: set[str] = set()
    with started_run(rank, data, changes) as run:
        tracker: Any = run.mesh.tracker
        inside, among = tracker.inside, tracker.among
        tracker.inside = lambda name, **options: seen.add(name) or inside(name, **options)
        tracker.among = lambda names: seen.add(names) or among(names)
        take_steps(run, 0, 1)
    return seen


def test_the_watchdog_sees_exchanges_and_the_pipeline(run_with_megatron: Callable[..., list[Any]], tiny_data: Path) -> None:
    for seen in run_with_megatron(2, tracked, str(tiny_data), {**ranks(2), **megatron(tp=2)}):
        rows = {DISPATCH_ROWS, COMBINE_ROWS, DISPATCH_ROWS + BACKWARD}
        assert seen >= {*rows, "Megatron's pipeline or gradient sums", "the optimizer's step"}


def numbers_of_weights(rank: RankContext, data: str, changes: Mapping[str, Any]) -> tuple[int, float]:
    """Returns the number of weights on this rank, and the dry run's estimate for the fullest rank."""
    with started_run(rank, data, changes) as run:
        positions = range(run.config.parallel.ep)
        estimates = [stage_memory(run.config, run.placement, rank=each, rows=1.0, pairs=1.0) for each in positions]
        return sum(each.numel() for each in run.parameters()), max(each.gradients for each in estimates) / 4


def test_the_dry_run_counts_the_weights_of_the_fullest_rank(
    run_in_world: Callable[..., list[Any]], tiny_data: Path
) -> None:
    counted = run_in_world(4, numbers_of_weights, str(tiny_data), {**ranks(2, 2), **megatron(tp=2, pp=2)})
    # The estimate spreads norms evenly over the stages, although the last stage has one more.
    assert max(own for own, _ in counted) == pytest.approx(counted[0][1], abs=32)


@pytest.mark.exhaustive
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_bf16_stays_within_its_rounding(
    run_with_megatron: Callable[..., list[Any]],
    own_losses: Callable[..., list[dict[str, Any]]],
    tiny_data: Path,
    sharded: bool,
) -> None:
    few, bf16 = {"train.steps": 6}, {"parallel.precision": "bf16", "train.steps": 6}
    fp32, own = own_losses(2, **few), own_losses(2, **bf16)
    layout = {**ranks(2), **bf16, **megatron(distributed_optimizer=sharded)}
    found = run_with_megatron(2, losses, str(tiny_data), layout)[0]

    def distance(steps: list[dict[str, Any]]) -> float:
        return max(abs(step["loss"] / exact["loss"] - 1) for step, exact in zip(steps, fp32, strict=True))

    assert 0 < distance(own) < 2**-8
    assert 0 < distance(found) < 2**-8  # half a unit in the last place of bf16
