"""Whole runs start with the weights of another model.

A trained top-k model that gets copied null rows is bit-equal to the original model. A dense model equals the model that
is upcycled from it. Weights that do not fit are refused before the first step.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe_dist.data.batch import Batch
from moe_dist.errors import ConfigError
from moe_dist.placement.parameter_names import named_parameters
from moe_dist.train.loop.trainer import Progress
from moe_dist.train.objective.loss import AuxSettings
from moe_dist.train.start.starting_weights import begin_with_weights
from tests.support.cover import exhaustive, full
from tests.support.engine_run import built_run
from tests.support.tiny import tiny_config
from tests.support.worlds import RankContext

AUX = AuxSettings(kind="null_averaged", balance=0.02, z=1e-3)
GROUPS = "model.moe.groups"


def on_two_ranks(cases: Iterable[str]) -> list[Any]:
    return [(full if "sharded" in case else exhaustive)(2, case) for case in cases]


def groups(text: tuple[int, int, int], image: tuple[int, int, int]) -> dict[str, Any]:
    """Returns configuration changes with the numbers of true experts, null experts and choices of both groups."""
    names = ("num_experts", "num_null", "top_k")
    return {
        f"{GROUPS}.{group}.{name}": value
        for group, values in (("text", text), ("image", image))
        for name, value in zip(names, values, strict=True)
    }


class Run:
    """One rank of a run, up to its first step."""

    def __init__(self, rank: RankContext, data: Path, root: Path, name: str, changes: dict[str, Any]) -> None:
        layout = {"run.name": name, "parallel.ep": rank.world_size, "placement.policy": "interleaved"}
        self.config, self._built = tiny_config(data, root, {**layout, **changes}), ExitStack()
        run = self._built.enter_context(built_run(self.config, world_size=rank.world_size))
        self.training, self.loader, self.saver = run.training, run.loader, run.saver()

    def train_and_save(self, steps: int = 3) -> None:
        for number in range(steps):
            self.training.step(self.loader.batches(8 * number), lr=1e-2, aux=AUX)
        self.saver.restore()  # reads the data's state
        self.saver.save(Progress(step=3, position=24, tokens=100, evaluated=2), durable=True)

    @torch.no_grad()
    def logits(self, batch: Batch) -> tuple[Tensor, list[float]]:
        """Returns the logits of a batch, and the number of true experts per token in each layer and group."""
        group = torch.where(batch.padding_BS, -1, self.training.step.group_of_modality[batch.modality_BS])
        logits, reports = self.training.parallel.model(batch.tokens_BS, batch.positions_BS, batch.documents_BS, group)
        placement = self.training.step.placement
        loads = [
            float(report.counts.choices_LC[0][each.experts].sum() / report.counts.tokens_LG[0][index])
            for report in reports
            for index, each in enumerate(placement.groups)
        ]
        return logits[~batch.padding_BS], loads  # experts skip padding, but a dense FFN does not

    def begin(self) -> str:
        """Loads the starting weights like `Resumable.restore` in a new run. Returns the report."""
        saver, model = self.saver, self.training.parallel.model
        return begin_with_weights(self.config, saver._checkpoints, saver._capture(), model)


class Trained(NamedTuple):
    """A trained run on this rank: its folder, a batch with logits and true experts per token, and the parameters."""

    folder: Path
    batch: Batch
    logits: Tensor
    loads: list[float]
    parameters: dict[str, Tensor]


KNOWN: dict[str, Trained] = {}  # cached, because many tests in this process start from the same few runs


def trained_run(rank: RankContext, data: Path, root: Path, changes: dict[str, Any]) -> Trained:
    key = f"{data} {rank.world_size} {changes}"
    if key not in KNOWN:
        run = Run(rank, data, root, "trained", changes)
        run.train_and_save()
        batch = run.loader.batches(0)[0]
        named = named_parameters(run.training.parallel.model) if rank.world_size == 1 else ()
        parameters = {name: parameter.detach().clone() for _, name, _, parameter in named}
        KNOWN[key] = Trained(root / "trained", batch, *run.logits(batch), parameters)
    return KNOWN[key]


def begun(rank: RankContext, data: Path, root: Path, trained: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Starts a run with the weights of a trained run, and compares their outputs."""
    first = trained_run(rank, data, root, trained)
    batch = first.batch  # the second run has another seed, and would draw another batch
    expected, before = first.logits, first.loads
    start = {"run.init_from": str(first.folder), "run.seed": 5}
    second = Run(rank, data, root, "begun", {**start, **changes})
    told: dict[str, Any] = {"fresh": bool(torch.equal(second.logits(batch)[0], expected))}
    try:
        told["report"] = second.begin()
    except ConfigError as error:
        return {**told, "error": str(error)}
    got, after = second.logits(batch)
    told |= {
        "equal": bool(torch.equal(got, expected)),
        "gap": float((got - expected).abs().max() / expected.abs().max()),
        "loads": (before, after),
        "parameters": {name: p.detach().clone() for _, name, _, p in named_parameters(second.training.parallel.model)}
        if rank.world_size == 1
        else {},
        "trained": first.parameters,
    }
    result = second.training.step(second.loader.batches(0), lr=1e-3, aux=AUX)
    told["trains"] = not result.skipped
    return told


def begun_unchanged(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checks on each rank that the second run starts equal to the first run up to rounding, and that it trains."""
    for told in ranks:
        assert not told["fresh"]
        assert "error" not in told, told
        assert told["gap"] < 2e-6
        assert "the same as the checkpoint's" in told["report"]
        assert told["trains"]
    return ranks


COPY = {"run.init_rules": ["copy_nulls"]}
COPIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top-2 and top-1": (groups((3, 0, 2), (2, 0, 1)), {**COPY, **groups((3, 3, 3), (2, 4, 3))}),
    "top-3 of 5": (groups((5, 0, 3), (2, 0, 2)), {**COPY, **groups((5, 10, 9), (2, 2, 4))}),
    "weights over all experts": (
        {**groups((4, 0, 3), (2, 0, 1)), "model.moe.router.normalise": "none"},
        {**COPY, **groups((4, 4, 5), (2, 2, 2)), "model.moe.router.normalise": "true_all"},
    ),
    "under a load controller": (
        {**groups((3, 0, 2), (2, 0, 1)), "model.moe.router.scale": 1.5},
        {
            **COPY,
            **groups((3, 6, 5), (2, 2, 1)),
            "model.moe.router.scale": 1.5,
            "model.moe.router.selection_bias": True,
            "model.moe.balance": [{"kind": "active_experts", "target": {"text": 1.5}, "rate": 0.1}],
        },
    ),
    "sharded, with a shared expert": (
        {**groups((4, 0, 2), (2, 0, 1)), "parallel.data": "fsdp2", "model.moe.shared_ffn_dim": 8},
        {**COPY, **groups((4, 4, 4), (2, 2, 2)), "parallel.data": "fsdp2", "model.moe.shared_ffn_dim": 8},
    ),
}


@pytest.mark.parametrize(("world_size", "case"), [(1, "top-3 of 5"), *on_two_ranks(COPIES)])
def test_a_trained_top_k_model_begins_as_it_is_to_the_last_bit(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, world_size: int, case: str
) -> None:
    trained, changes = COPIES[case]
    for told in run_in_world(world_size, begun, tiny_data, tmp_path, trained, changes):
        assert not told["fresh"]
        assert "error" not in told, told
        assert told["equal"], told["gap"]
        before, after = told["loads"]
        assert before == after
        assert "the same as the checkpoint's, to the last bit" in told["report"]
        assert told["trains"]


UPCYCLE = {"run.init_rules": ["upcycle"]}
SEED = groups((1, 0, 1), (1, 0, 1))
ONE_GROUP = {GROUPS: {"all": {"num_experts": 1, "top_k": 1, "ffn_dim": 16, "modalities": ["text", "image"]}}}
SAME_WIDTH = {f"{GROUPS}.image.ffn_dim": 16}
UPCYCLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one expert a group": (SEED, {**UPCYCLE, **groups((4, 0, 2), (3, 0, 1))}),
    "one group for all": (ONE_GROUP, {**UPCYCLE, **groups((4, 0, 3), (2, 0, 2)), **SAME_WIDTH}),
    "a dense layer": (
        {**SEED, **SAME_WIDTH, "model.moe.first": 1, "model.dense_ffn_dim": 16},
        {**UPCYCLE, **groups((4, 0, 2), (3, 0, 2)), **SAME_WIDTH},
    ),
    "with null experts": (SEED, {"run.init_rules": ["upcycle", "copy_nulls"], **groups((4, 4, 4), (2, 4, 3))}),
    "with its head_dim in words": (SEED, {**UPCYCLE, **groups((4, 0, 2), (3, 0, 1)), "model.head_dim": 8}),
    "with fewer null experts than choices": (SEED, {**UPCYCLE, **groups((4, 1, 2), (2, 2, 3))}),
    "sharded": (
        {**SEED, "parallel.data": "fsdp2"},
        {**UPCYCLE, **groups((4, 0, 2), (2, 0, 2)), "parallel.data": "fsdp2"},
    ),
}


@pytest.mark.parametrize(("world_size", "case"), [(1, "one expert a group"), *on_two_ranks(UPCYCLED)])
def test_an_upcycled_model_computes_what_it_was_made_of(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, world_size: int, case: str
) -> None:
    trained, changes = UPCYCLED[case]
    for told in begun_unchanged(run_in_world(world_size, begun, tiny_data, tmp_path, trained, changes)):
        if world_size == 1 and case == "one expert a group":
            stack = told["parameters"]["layers.0.moe.experts.text.gate"]
            assert stack.shape[0] == 4
            assert all(torch.equal(stack[0], each) for each in stack[1:])
            router = told["parameters"]["layers.0.moe.router.text.true"]
            assert not torch.equal(router[0], router[1]), "new experts need rows that differ"
            report = told["report"]
            # 3 new experts in each of 2 layers
            assert "layers.*.moe.experts.text.*.gate of layers.*.moe.experts.text.*.gate x 6" in report
            assert "layers.*.moe.router.text.true x 2 (shape (4, 32) in the model, (1, 32) in the checkpoint)" in report


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({**groups((4, 0, 2), (2, 0, 1)), "model.moe.router.normalise": "none"}, "a token's weights need not"),
        ({**groups((4, 0, 2), (2, 0, 1)), "model.moe.router.scale": 2.0}, "scale=2, the experts were scaled by 1.0"),
        (groups((4, 2, 2), (2, 0, 1)), "group text may choose null experts alone (top_k=2, num_null=2)"),
        ({**groups((4, 0, 2), (2, 0, 1)), "model.moe.shared_ffn_dim": 8}, "shared.gate.weight stays as initialised"),
        (
            {**groups((4, 0, 2), (2, 0, 1)), "model.mixture_of_depths": {"capacity": 0.5, "causal": "threshold"}},
            "model.mixture_of_depths=",
        ),
    ],
)
def test_an_upcycled_model_that_computes_something_else_says_why(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    (told,) = run_in_world(1, begun, tiny_data, tmp_path, SEED, {**UPCYCLE, **changes})
    assert told["gap"] > 1e-4
    assert reason in told["report"].splitlines()[-1]


SPLIT = {"run.init_rules": ["split"]}
PARTS = {**groups((4, 4, 4), (4, 2, 4)), f"{GROUPS}.text.ffn_dim": 4, f"{GROUPS}.image.ffn_dim": 6}
SUMMED = {**SPLIT, **PARTS, "model.moe.router.scale": 4.0}
SIGMOIDS = {
    "model.moe.router": {"kind": "group_limited", "normalise": "none", "scale": 2.0},
    "model.moe.balance": [{"kind": "active_experts", "target": {"text": 2.0, "image": 1.0}, "rate": 0.1}],
}
SPLITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one expert a group": (SEED, SUMMED),
    "sigmoids under a controller": (
        SEED,
        {**SPLIT, **PARTS, **SIGMOIDS, **groups((4, 4, 4), (2, 2, 2)), f"{GROUPS}.image.ffn_dim": 12},
    ),
    "a dense layer": (
        {**SEED, **SAME_WIDTH, "model.moe.first": 1, "model.dense_ffn_dim": 16, "parallel.data": "fsdp2"},
        {**SUMMED, f"{GROUPS}.image.ffn_dim": 4},
    ),
    "sharded": ({**SEED, "parallel.data": "fsdp2"}, {**SUMMED, "parallel.data": "fsdp2"}),
}


@pytest.mark.parametrize(("world_size", "case"), [(1, "one expert a group"), *on_two_ranks(SPLITS)])
def test_the_parts_of_an_ffn_together_are_the_ffn(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, world_size: int, case: str
) -> None:
    trained, changes = SPLITS[case]
    for told in begun_unchanged(run_in_world(world_size, begun, tiny_data, tmp_path, trained, changes)):
        taken = [changes[f"{GROUPS}.{group}.num_experts"] for group in ("text", "image")]
        assert set(zip(told["loads"][1][::2], told["loads"][1][1::2], strict=True)) == {tuple(taken)}
        assert "the same as the checkpoint's; the output of an FFN is the sum of its parts" in told["report"]
        for name in ("gate", "up", "down") if told["parameters"] else ():  # the joined parts equal the FFN
            parts = told["parameters"][f"layers.0.moe.experts.text.{name}"]
            whole = told["trained"][f"layers.0.moe.experts.text.{name}"][0]
            assert torch.equal(torch.cat([*parts], dim=1 if name == "down" else 0), whole)


BARE = groups((3, 0, 2), (2, 0, 1))
COPIED = {**COPY, **groups((3, 3, 3), (2, 2, 2))}
MORE = {**UPCYCLE, **groups((4, 0, 2), (2, 0, 1))}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    # With k = 3 and m = 2 n null experts a token would take one true expert, where the trained run took two.
    (BARE, {**COPY, **groups((3, 6, 3), (2, 2, 1))}, "top_k from 4 to 6"),
    (BARE, {**COPIED, "model.rope_base": 500.0}, "model.rope_base=500.0, the checkpoint's is 10000.0"),
    (BARE, {**COPIED, "model.vocab_size": 80}, "embedding.weight stays as initialised (shape (80, 32) in the model, "
     "(64, 32) in"),
    (BARE, {**COPIED, "model.num_layers": 1}, "layers.1.attention.k.weight of the checkpoint has no place"),
    (SEED, {**MORE, f"{GROUPS}.text.ffn_dim": 20},
     "layers.0.moe.experts.text.0.gate: shape (20, 32) in the model, (16, 32) in layers.0.moe.experts.text.0.gate"),
    (groups((2, 0, 2), (1, 0, 1)), MORE,
     "layers.0.moe.experts.text: 4 experts in the model, 2 in the checkpoint; only a single expert can be copied"),
    (SEED, {**UPCYCLE, **SEED}, "upcycle finds nothing to copy"),
    (SEED, {**MORE, "model.num_kv_heads": 1},
     "model.num_kv_heads=1, the checkpoint's is 2; take that"),
    (SEED, {**UPCYCLE, GROUPS: {"all": {"num_experts": 2, "top_k": 1, "ffn_dim": 16, "modalities": ["text", "image"]}}},
     "the checkpoint lacks this group in this layer; it has image, text"),
    (SEED, {**SUMMED, f"{GROUPS}.text.ffn_dim": 5},
     "model.moe.groups.text: num_experts gives each FFN 4 parts, and 4 x ffn_dim=5 must be the width 16 of layers.0.moe."
      "experts.text.0.gate, with "
     "the same hidden_dim; take ffn_dim=4"),
    (SEED, {**SPLIT, **PARTS, **SIGMOIDS, **groups((7, 7, 7), (4, 4, 4))}, "take num_experts for 8 parts, or for another"),
    ({**SEED, "model.moe.router.scale": 2.0}, SUMMED, "model.moe.router.scale=2.0, but the parts start with weight 1"),
    (SEED, {**SUMMED, "model.moe.shared_ffn_dim": 8}, "shared.gate.weight stays as initialised"),
    (SEED, {**SUMMED, "model.mixture_of_depths": {"capacity": 0.5, "causal": "threshold"}}, "model.mixture_of_depths="),
]  # fmt: skip


@pytest.mark.parametrize(("trained", "changes", "fault"), REFUSED)
@pytest.mark.slow
def test_weights_that_would_compute_something_else_are_refused(
    run_in_world: Callable[..., list[Any]],
    tiny_data: Path,
    tmp_path: Path,
    trained: dict[str, Any],
    changes: dict[str, Any],
    fault: str,
) -> None:
    (told,) = run_in_world(1, begun, tiny_data, tmp_path, trained, changes)
    assert fault in told["error"]


def fully_tuned(rank: RankContext, data: Path, root: Path, changes: dict[str, Any]) -> dict[str, bool]:
    """Trains a run, then fine-tunes it for two steps without a balance loss. Returns, for each parameter, whether these
    steps changed it."""
    Run(rank, data, root, "trained", {}).train_and_save()
    run = Run(rank, data, root, "tuned", {"run.init_from": str(root / "trained"), **changes})
    run.begin()
    named = {name: parameter for _, name, _, parameter in named_parameters(run.training.parallel.model)}
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    for _ in range(2):
        result = run.training.step(
            run.loader.batches(0), lr=1e-2, aux=AuxSettings(kind="null_averaged", balance=0.0, z=0.0)
        )
        assert not result.skipped
        assert result.balance == 0.0
    return {name: not torch.equal(parameter, before[name]) for name, parameter in named.items() if parameter.numel()}


@pytest.mark.parametrize("changes", [full({}), {"parallel.data": "fsdp2"}], ids=["ddp", "fsdp2"])
def test_routers_stay_frozen_in_full_fine_tuning(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """With `train.frozen: routers` the routers stay bit-equal, and all other parameters change. Without this
    option all parameters change except null rows."""
    frozen = {**changes, "train.frozen": "routers"}
    for moved in run_in_world(2, fully_tuned, tiny_data, tmp_path, frozen):
        assert {name for name, each in moved.items() if not each} == {name for name in moved if ".router." in name}
    for moved in run_in_world(2, fully_tuned, tiny_data, tmp_path / "free", changes):
        assert all(each for name, each in moved.items() if not name.endswith(".null"))
