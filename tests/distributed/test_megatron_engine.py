"""The engine of Megatron-Core against this project's own: the same sequences, the same losses."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_dist.comm.names import BACKWARD, COMBINE_ROWS, DISPATCH_ROWS
from moe_dist.data.batch import Batch
from moe_dist.moe.routing import LayerReport
from moe_dist.plan.pipeline_memory import stage_memory
from tests.support.cover import exhaustive, full
from tests.support.engine_run import losses, megatron, started_run, take_steps
from tests.support.worlds import RankContext

pytestmark = pytest.mark.megatron

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
    """Steps of this project's own engine on so many ranks; each is computed once."""
    known: dict[str, list[dict[str, Any]]] = {}

    def of(world_size: int, **changes: Any) -> list[dict[str, Any]]:
        key = f"{world_size} {changes}"
        if key not in known:
            layout = {**ranks(1, world_size), **changes}
            known[key] = run_in_world(world_size, losses, str(tiny_data), layout)[0]
        return known[key]

    return of


LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {  # ranks, changes, and ranks that read different sequences
    "ep2-cp2": (2, {**ranks(2), **megatron(cp=2)}, 1),
    "tp2-ep2-pp2": (4, {**ranks(2, 2), **megatron(tp=2, pp=2)}, 1),
    "pp2-vpp2": (2, {**ranks(1, 2), **megatron(pp=2, vpp=2)}, 1),
    "one rank": (1, {**ranks(1), **megatron()}, 1),
    "pinned-do": (2, {**ranks(2), "placement": PINNED, **megatron(distributed_optimizer=True)}, 2),
    "uneven": (4, {**ranks(4), **explicit(UNEVEN), **megatron()}, 4),
    "uneven-tp2-do": (4, {**ranks(4), **explicit(UNEVEN), **megatron(tp=2, distributed_optimizer=True)}, 2),
    "tp2-cp2": (4, {**ranks(2, 2), **megatron(tp=2, cp=2)}, 1),
    "8 ranks": (8, {**ranks(2, 4), **megatron(tp=2, pp=2)}, 2),
}


@pytest.mark.parametrize("name", ["ep2-cp2", *map(full, list(LAYOUTS)[1:3]), *map(exhaustive, list(LAYOUTS)[3:])])
def test_losses_equal_those_of_the_own_engine(
    run_in_world: Callable[..., list[Any]], own_losses: Callable[..., list[dict[str, Any]]], tiny_data: Path, name: str
) -> None:
    world_size, changes, data_ranks = LAYOUTS[name]
    expected = own_losses(data_ranks)
    for found in run_in_world(world_size, losses, str(tiny_data), changes):
        close(found, expected, bound=1e-5)


NO_NULLS = {f"model.moe.groups.{name}.num_null": 0 for name in ("text", "image")}
ACTIVE = {
    "kind": "active_experts",
    "target": {"text": 1.2, "image": 0.8},
    "rate": 0.05,
    "proportional": 0.1,
    "per": "expert",
}
LOSS_FREE = {"kind": "loss_free", "rate": 0.01}
TENSOR, STAGES = {**ranks(2), **megatron(tp=2)}, {**ranks(1, 2), **megatron(pp=2)}
# Routers by which tokens choose, the controllers of their biases, and the layout.
ROUTERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "top_p": ({"kind": "top_p"}, [ACTIVE], STAGES),
    "scaled": ({"kind": "group_limited", "selection_bias": False, "scale": 2.0}, [], TENSOR),
    "group_limited": ({"kind": "group_limited", "selection_bias": True}, [LOSS_FREE], STAGES),
    "top_k": ({"kind": "top_k", "selection_bias": True}, [{**ACTIVE, "per": "group"}, LOSS_FREE], STAGES),
    "relu": ({"kind": "relu"}, [ACTIVE], STAGES),
    "threshold": ({"kind": "threshold"}, [], STAGES),
    "predicted_k": ({"kind": "predicted_k"}, [ACTIVE], STAGES),
    "true_all": ({"kind": "top_k", "normalise": "true_all", "null_logit": "single"}, [], TENSOR),
    "logit_bias": ({"kind": "top_k", "logit_bias": True}, [], TENSOR),
}


@pytest.mark.parametrize("name", ["top_p", full("scaled"), *map(exhaustive, list(ROUTERS)[2:])])
def test_routers_and_their_biases_follow_the_loads_of_all_ranks(
    run_in_world: Callable[..., list[Any]], own_losses: Callable[..., list[dict[str, Any]]], tiny_data: Path, name: str
) -> None:
    router, balance, layout = ROUTERS[name]
    changes = {"model.moe.router": router, "model.moe.balance": balance} | (NO_NULLS if "logit_bias" in router else {})
    expected = own_losses(1, **changes)
    for found in run_in_world(2, losses, str(tiny_data), {**changes, **layout}):
        close(found, expected, bound=1e-5)
        assert (found[-1]["choices"] == expected[-1]["choices"]).all()


DISPATCH: dict[str, dict[str, Any]] = {
    "uneven": explicit(UNEVEN),
    "overlap": {"parallel.dispatch": {"kind": "all_to_all", "overlap": True, "chunks": 2}},
    "hierarchical": {"parallel.dispatch": {"kind": "hierarchical", "ranks_per_node": 2}, "parallel.check_exchanges": True},
    "static": {"parallel.dispatch": {"kind": "static", "room": 4.0}},
}


@pytest.mark.parametrize("name", ["uneven", "overlap", exhaustive("hierarchical"), exhaustive("static")])
def test_the_ledger_counts_what_the_own_engine_sends(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, name: str
) -> None:
    changes = {"train.steps": 3, **ranks(4), **DISPATCH[name]}
    own = run_in_world(4, losses, str(tiny_data), changes)[0]
    found = run_in_world(4, losses, str(tiny_data), {**changes, **megatron()})[0]
    close(found, own, bound=1e-5)
    for theirs, ours in zip(found, own, strict=True):
        assert theirs["rows"] == ours["rows"]
        assert (theirs["choices"] == ours["choices"]).all()
        assert ours["rows"]["payload_bytes"] > 0


CHOICE: Mapping[str, Any] = {
    "model.moe.router": {"kind": "expert_choice", "causal": "threshold", "capacity": 0.6},
    "loss.balance.schedule": [[0, 0.0]],
    "loss.z": 0.0,
    **NO_NULLS,
}


class Choices:
    """Keeps what a trace would write of each micro-batch."""

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
    """Tokens, columns and weights of a step by micro-batch and layer."""
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
    run_in_world: Callable[..., list[Any]],
    tiny_data: Path,
    world_size: int,
    layout: Mapping[str, Any],
    writer: int,
    changes: Mapping[str, Any],
) -> None:
    expected = run_in_world(1, traced, str(tiny_data), {**ranks(1), **changes})[0]
    found = run_in_world(world_size, traced, str(tiny_data), {**layout, **changes})
    for rank, seen in enumerate(found):
        for (tokens, column, weight), (own_tokens, own_column, own_weight) in zip(seen, expected, strict=True):
            if rank != writer:
                assert not tokens.any()
                continue
            assert (tokens == own_tokens).all()
            assert (column == own_column).all()
            assert weight == pytest.approx(own_weight, rel=2e-3)  # float16


def poisoned(rank: RankContext, data: str, changes: Mapping[str, Any]) -> tuple[bool, bool, float]:
    """A step with a weight that is no number on one rank: whether it was skipped, whether moments moved, and the loss of
    the next step without that weight."""
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
    run_in_world: Callable[..., list[Any]], own_losses: Callable[..., list[dict[str, Any]]], tiny_data: Path
) -> None:
    expected = own_losses(1)[0]["loss"]
    for skipped, moved, loss in run_in_world(2, poisoned, str(tiny_data), {**ranks(1, 2), **megatron(pp=2)}):
        assert skipped
        assert not moved
        assert loss == pytest.approx(expected, rel=1e-5)


def tracked(rank: RankContext, data: str, changes: Mapping[str, Any]) -> set[str]:
    """Collectives of a step that the watchdog sees."""
    seen: set[str] = set()
    with started_run(rank, data, changes) as run:
        tracker: Any = run.mesh.tracker
        inside, among = tracker.inside, tracker.among
        tracker.inside = lambda name, **options: seen.add(name) or inside(name, **options)
        tracker.among = lambda names: seen.add(names) or among(names)
        take_steps(run, 0, 1)
    return seen


def test_the_watchdog_sees_exchanges_and_the_pipeline(run_in_world: Callable[..., list[Any]], tiny_data: Path) -> None:
    for seen in run_in_world(2, tracked, str(tiny_data), {**ranks(2), **megatron(tp=2)}):
        rows = {DISPATCH_ROWS, COMBINE_ROWS, DISPATCH_ROWS + BACKWARD}
        assert seen >= {*rows, "Megatron's pipeline or gradient sums", "the optimizer's step"}


def numbers_of_weights(rank: RankContext, data: str, changes: Mapping[str, Any]) -> tuple[int, float]:
    """Weights on this rank, and those of the fullest by the dry run."""
    with started_run(rank, data, changes) as run:
        positions = range(run.config.parallel.ep)
        estimates = [stage_memory(run.config, run.placement, rank=each, rows=1.0, pairs=1.0) for each in positions]
        return sum(each.numel() for each in run.parameters()), max(each.gradients for each in estimates) / 4


def test_the_dry_run_counts_the_weights_of_the_fullest_rank(
    run_in_world: Callable[..., list[Any]], tiny_data: Path
) -> None:
    counted = run_in_world(4, numbers_of_weights, str(tiny_data), {**ranks(2, 2), **megatron(tp=2, pp=2)})
    # The estimate spreads norms evenly over stages, but the last stage has one more.
    assert max(own for own, _ in counted) == pytest.approx(counted[0][1], abs=32)


@pytest.mark.exhaustive
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_bf16_stays_within_its_rounding(
    run_in_world: Callable[..., list[Any]],
    own_losses: Callable[..., list[dict[str, Any]]],
    tiny_data: Path,
    sharded: bool,
) -> None:
    few, bf16 = {"train.steps": 6}, {"parallel.precision": "bf16", "train.steps": 6}
    fp32, own = own_losses(2, **few), own_losses(2, **bf16)
    layout = {**ranks(2), **bf16, **megatron(distributed_optimizer=sharded)}
    found = run_in_world(2, losses, str(tiny_data), layout)[0]

    def distance(steps: list[dict[str, Any]]) -> float:
        return max(abs(step["loss"] / exact["loss"] - 1) for step, exact in zip(steps, fp32, strict=True))

    assert 0 < distance(own) < 2**-8
    assert 0 < distance(found) < 2**-8  # half a unit in the last place of bf16
