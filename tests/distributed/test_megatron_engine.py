"""The engine of Megatron-Core and this project's own engine have equal losses on equal sequences."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import yaml

from moe_dist.comm.names import BACKWARD, COMBINE_ROWS, DISPATCH_ROWS
from moe_dist.data.batch import Batch
from moe_dist.hf.importing import import_model
from moe_dist.hf.plan import ImportOptions
from moe_dist.moe.routing.types import LayerReport
from moe_dist.plan.pipeline_memory import stage_memory
from moe_dist.train.step.tracing import StepWatcher
from tests.support.cover import exhaustive, full
from tests.support.engine_run import losses, megatron, ranks, started_run, take_steps
from tests.support.tiny_hf import save, tiny_model
from tests.support.worlds import RankContext

pytestmark = pytest.mark.megatron
Run = Callable[..., list[Any]]
# Two of the ranks have no experts.
UNEVEN = {"placement": {"policy": "explicit", "slots": [["text/0", "text/1", "image/0"], ["text/2", "image/1"], [], []]}}
PINNED = {"placement": {"policy": "pinned", "groups": {"text": {"ranks": [0]}, "image": {"ranks": [1]}}}}
TENSOR, STAGES = {**ranks(2), **megatron(tp=2)}, {**ranks(1, 2), **megatron(pp=2)}
BLOCK = {**ranks(2, 2), **megatron(tp=2, pp=2)}


def close(found: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float = 1e-5, norm: float = 1e-4) -> None:
    for step, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
        assert (theirs["tokens"], theirs["labels"]) == (ours["tokens"], ours["labels"])
        for key in ("loss", "balance", "z"):
            assert theirs[key] == pytest.approx(ours[key], rel=rel), f"{key} of step {step}"
        assert theirs["norm"] == pytest.approx(ours["norm"], rel=norm), f"step {step}"


@pytest.fixture(scope="module")
def own_losses(run_engine: Run) -> Callable[..., list[dict[str, Any]]]:
    """Returns a function from a number of data-parallel ranks to the steps of this project's own engine (cached)."""
    known: dict[str, list[dict[str, Any]]] = {}

    def of(data_ranks: int, **changes: Any) -> list[dict[str, Any]]:
        key = f"{data_ranks} {changes}"
        if key not in known:
            known[key] = run_engine({**ranks(1, data_ranks), **changes}, losses)[0]
        return known[key]

    return of


ATTENTION = {"model.qk_norm": "full", "model.attention_bias": "qkv", "model.rope_dim": 4, "model.tie_embeddings": True}
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {  # changes, and the number of ranks that read different data
    "ep2-cp2": ({**ranks(2), **megatron(cp=2)}, 1),
    "pp2-vpp2": ({**ranks(1, 2), **megatron(pp=2, vpp=2)}, 1),
    "tp2-ep2-pp2": (BLOCK, 1),
    "one rank": ({**ranks(1), **megatron()}, 1),
    "pinned-do": ({**ranks(2), **PINNED, **megatron(distributed_optimizer=True)}, 2),
    "uneven-tp2-do": ({**ranks(4), **UNEVEN, **megatron(tp=2, distributed_optimizer=True)}, 2),
    "tp2-cp2": ({**ranks(2, 2), **megatron(tp=2, cp=2)}, 1),
    "8 ranks": ({**ranks(2, 4), **megatron(tp=2, pp=2)}, 2),
}


@pytest.mark.parametrize("name", ["ep2-cp2", full("pp2-vpp2"), *map(exhaustive, list(LAYOUTS)[2:])])
@pytest.mark.slow
def test_losses_equal_those_of_the_own_engine(
    run_engine: Run, own_losses: Callable[..., list[dict[str, Any]]], name: str
) -> None:
    layout, data_ranks = LAYOUTS[name]
    for found in run_engine({**layout, **ATTENTION}, losses):
        close(found, own_losses(data_ranks, **ATTENTION))


# Variants of `tiny_config` in transformers' form. CI runs the layout "tp2-ep2-pp2" of the first seven.
IN_CI = ("qwen3_moe", "olmoe biased", "qwen2_moe", "glm4_moe", "ernie4_5_moe tied", "gpt_oss", "deepseek_v3")
FAMILIES = (*IN_CI, "glm4_moe plain", "mixtral sliding", "olmoe dynamic", "qwen2_moe sliding", "qwen3_moe sliding",
            "deepseek_v3 plain", "llama scaled")  # fmt: skip
DEGREES: dict[str, dict[str, Any]] = {
    "tp2": TENSOR,
    "pp2": {**ranks(1, 2), **megatron(pp=2, layers=[1, 2])},  # if the first layer is dense, a stage has no experts
    "cp2": {**ranks(2), **megatron(cp=2)},
    "ep2": {**ranks(2), "train.micro_batch": 1, **megatron()},
    "tp2-ep2-pp2": {**ranks(2, 2), **megatron(tp=2, pp=2, layers=[2, 1])},
    "tp2-cp2-do": {**ranks(2, 2), **megatron(tp=2, cp=2, distributed_optimizer=True)},
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Returns a function from a family to the changes that begin a run with transformers' weights (cached)."""

    @cache
    def of(family: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("family")
        save(tiny_model(family, num_hidden_layers=3), folder / "theirs")
        import_model(folder / "theirs", folder / "ours", ImportOptions(modalities=("text", "image")))
        model = yaml.safe_load((folder / "ours" / "config.yaml").read_text())["model"]
        balance = {"model.moe.balance": [LOSS_FREE]} if model["moe"]["router"].get("selection_bias") else {}
        model["max_seq_len"] = 64  # longer than the length from which dynamic RoPE changes
        return {"model": model, "run.init_from": str(folder / "ours"), "train.steps": 5, "train.global_batch": 4, **balance}

    return of


@pytest.mark.parametrize(
    ("family", "degrees"),
    [
        (family, degrees) if family in IN_CI and degrees == "tp2-ep2-pp2" else exhaustive(family, degrees)
        for family in FAMILIES
        for degrees in DEGREES
    ],
)
def test_models_of_transformers_train_as_with_the_own_engine(
    run_engine: Run,
    own_losses: Callable[..., list[dict[str, Any]]],
    imported: Callable[[str], dict[str, Any]],
    family: str,
    degrees: str,
) -> None:
    expected = own_losses(1, **imported(family))
    for found in run_engine({**imported(family), **DEGREES[degrees]}, losses):
        close(found, expected, rel=1e-6, norm=1e-6)


NO_NULLS = {f"model.moe.groups.{name}.num_null": 0 for name in ("text", "image")}
TARGET = {"text": 1.2, "image": 0.8}
ACTIVE = {"kind": "active_experts", "target": TARGET, "rate": 0.05, "proportional": 0.1, "per": "expert"}
LOSS_FREE = {"kind": "loss_free", "rate": 0.01}
# For each token-choice router: its section, the controllers of its biases, and the layout.
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
@pytest.mark.slow
def test_routers_and_their_biases_follow_the_loads_of_all_ranks(
    run_engine: Run, own_losses: Callable[..., list[dict[str, Any]]], name: str
) -> None:
    router, balance, layout = ROUTERS[name]
    changes = {"model.moe.router": router, "model.moe.balance": balance} | (NO_NULLS if "logit_bias" in router else {})
    expected = own_losses(1, **changes)
    for found in run_engine({**changes, **layout}, losses):
        close(found, expected)
        assert (found[-1]["choices"] == expected[-1]["choices"]).all()


DISPATCH: dict[str, dict[str, Any]] = {
    "uneven": UNEVEN,
    "overlap": {"parallel.dispatch": {"kind": "all_to_all", "overlap": True, "chunks": 2}},
    "hierarchical": {"parallel.dispatch": {"kind": "hierarchical", "ranks_per_node": 2}},
    "static": {"parallel.dispatch": {"kind": "static", "room": 4.0}},
}


@pytest.mark.parametrize("name", ["uneven", full("overlap"), exhaustive("hierarchical"), exhaustive("static")])
def test_the_ledger_counts_what_the_own_engine_sends(run_engine: Run, name: str) -> None:
    changes = {"train.steps": 3, **ranks(4), **DISPATCH[name]}
    own, found = (run_engine({**changes, **engine}, losses)[0] for engine in ({}, megatron()))
    close(found, own)
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


class Choices(StepWatcher):
    """Keeps the tokens, columns and weights that a trace would write for each micro-batch and layer."""

    own_tokens = False

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def add(self, batch: Batch, reports: Sequence[LayerReport]) -> None:
        tokens = (~batch.padding_BS).flatten()
        for report in reports:
            self.seen.append(tuple(each.numpy() for each in (tokens, *(part[tokens] for part in report.chosen))))


def traced(rank: RankContext, data: str, changes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    watcher = Choices()
    with started_run(rank, data, changes) as run:
        take_steps(run, 0, 1, [watcher])
    return watcher.seen


@pytest.mark.parametrize(
    ("layout", "writer", "changes"),
    [(BLOCK, 2, {}), full(BLOCK, 2, CHOICE), exhaustive({**ranks(2), **megatron(cp=2)}, 0, {})],
    ids=["tp2-pp2", "choice", "cp2"],
)
def test_a_trace_has_every_token_once_with_its_choices(
    run_engine: Run, layout: dict[str, Any], writer: int, changes: Mapping[str, Any]
) -> None:
    expected = run_engine({**ranks(1), **changes}, traced)[0]
    for rank, seen in enumerate(run_engine({**layout, **changes}, traced)):
        for (tokens, column, weight), (own_tokens, own_column, own_weight) in zip(seen, expected, strict=True):
            if rank != writer:
                assert not tokens.any()
                continue
            assert (tokens == own_tokens).all()
            assert (column == own_column).all()
            assert weight == pytest.approx(own_weight, rel=2e-3)  # traces store float16


def poisoned(rank: RankContext, data: str, changes: Mapping[str, Any]) -> tuple[bool, bool, float]:
    """Takes a step while the last rank has a NaN weight. Returns whether the step was skipped, whether moments changed,
    and the loss of the next step with the weight restored."""
    with started_run(rank, data, changes) as run:
        weight = next(run.parameters()).data.flatten()
        before = weight[0].item()
        if rank.rank == rank.world_size - 1:
            weight[0] = float("nan")
        batches = run.loader.batches(0)
        skipped = run.training.step(batches, lr=run.plan.lr(0), aux=run.plan.aux(0), number=0).skipped
        weight[0] = before
        optimizer: Any = run.training.optimizer
        moved = any(group.get("step") for group in optimizer.param_groups) or any(
            state for each in optimizer.chained_optimizers for state in each.optimizer.state.values()
        )
        return skipped, moved, take_steps(run, 0, 1)[0]["loss"]


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(
    run_engine: Run, own_losses: Callable[..., list[dict[str, Any]]]
) -> None:
    for skipped, moved, loss in run_engine(STAGES, poisoned):
        assert skipped
        assert not moved
        assert loss == pytest.approx(own_losses(1)[0]["loss"], rel=1e-5)


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


def test_the_watchdog_sees_exchanges_and_the_pipeline(run_engine: Run) -> None:
    expected = {DISPATCH_ROWS, COMBINE_ROWS, DISPATCH_ROWS + BACKWARD}
    expected |= {"Megatron's pipeline or gradient sums", "the optimizer's step"}
    assert all(seen >= expected for seen in run_engine(TENSOR, tracked))


def numbers_of_weights(rank: RankContext, data: str, changes: Mapping[str, Any]) -> tuple[int, float]:
    """Returns the number of weights on this rank, and the dry run's estimate for the fullest rank."""
    with started_run(rank, data, changes) as run:
        positions = range(run.config.parallel.ep)
        estimates = [stage_memory(run.config, run.placement, rank=each, rows=1.0, pairs=1.0) for each in positions]
        return sum(each.numel() for each in run.parameters()), max(each.gradients for each in estimates) / 4


UNEVEN_STAGES = {**DEGREES["pp2"], "model.num_layers": 3, **ATTENTION, "model.moe.every": 1, "model.moe.first": 0}


@pytest.mark.parametrize("layout", [BLOCK, exhaustive(UNEVEN_STAGES)], ids=["even", "uneven"])
def test_the_dry_run_counts_the_weights_of_the_fullest_rank(run_engine: Run, layout: dict[str, Any]) -> None:
    counted = run_engine(layout, numbers_of_weights)
    # The estimate spreads the norms evenly over stages, but the last stage has one more norm.
    assert max(own for own, _ in counted) == pytest.approx(counted[0][1], abs=32)


@pytest.mark.exhaustive
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_bf16_stays_within_its_rounding(
    run_engine: Run, own_losses: Callable[..., list[dict[str, Any]]], sharded: bool
) -> None:
    bf16 = {"parallel.precision": "bf16"}
    found = run_engine({**ranks(2), **bf16, **megatron(distributed_optimizer=sharded)}, losses)[0]
    for steps in (found, own_losses(2, **bf16)):
        distances = [abs(step["loss"] / exact["loss"] - 1) for step, exact in zip(steps, own_losses(2), strict=True)]
        assert 0 < max(distances) < 2**-8  # half a unit in the last place of bf16
