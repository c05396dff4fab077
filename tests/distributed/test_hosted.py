"""With engine.kind=transformers, N ranks train as one rank does, and first losses equal the losses of transformers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.data.batch import IGNORED, Batch
from moe_dist.hf.host.dense import hosted_family
from moe_dist.hf.host.weights import write_folder
from moe_dist.inference.loaded_run import find_trained
from moe_dist.placement.parameter_names import Role
from moe_dist.train.build import hosted
from moe_dist.train.objective.loss import forward
from moe_dist.train.start.resume import Progress
from tests.support.cover import full, full_unless
from tests.support.engine_run import Run, built_run, take_steps
from tests.support.hosted import CHANGES, FAMILIES, UNEVEN, hosted_config, of_family
from tests.support.invoked import invoke
from tests.support.whole_run import WholeRun, whole_run
from tests.support.worlds import RankContext
from tools import export_hf

FSDP2: dict[str, Any] = {"parallel.ep": 1, "parallel.edp": 2, "parallel.data": "fsdp2"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "uneven": {**UNEVEN},
    "uneven, recompute=block": {**UNEVEN, "parallel.recompute": "block"},
    "fsdp2": FSDP2,
    "ep2, fsdp2, recompute=experts": {**FSDP2, "parallel.ep": 2, "parallel.recompute": "experts"},
    "ep4": {"parallel.ep": 4},
    "hierarchical": {"parallel.ep": 4, "parallel.dispatch": {"kind": "hierarchical", "ranks_per_node": 2}},
}
ONE: dict[str, Any] = {"parallel.ep": 1}
IN_TEST = {("qwen3_moe", "ep2, fsdp2, recompute=experts"), ("gpt_oss", "uneven, recompute=block"), ("deepseek_v3", "ep4")}


@contextmanager
def in_float64() -> Iterator[None]:
    """Runs hosted models in float64, with eager experts, because `grouped_mm` does not support float64."""

    def double_model(*given: Any) -> Any:
        model = hosted_family(*given).double()
        for module in model.modules():
            if hasattr(module, "_is_expert_parallel") and hasattr(module, "config"):
                module.config._experts_implementation = "eager"
        return model

    double = mock.patch.dict(hosted.COMPUTE_DTYPES, fp32=torch.float64)
    with double, mock.patch.object(hosted, "hosted_family", double_model):
        yield


def steps(
    rank: RankContext, data: str, root: str, model: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], tuple[bool, bool]]:
    """Returns reports of three steps, whether attention stays inside each document of a packed sequence, and whether router
    scores are sigmoids."""
    torch.set_num_threads(1)
    config = hosted_config(data, root, model, changes)
    with in_float64(), built_run(config, world_size=rank.world_size) as run:
        model: Any = run.training.parallel.model
        return take_steps(run, 0, 3), (model.packed, model.moe_modules()[0].router.sigmoid)


@pytest.mark.parametrize(
    ("family", "layout"),
    full_unless(lambda *case: case in IN_TEST, [(family, layout) for family in FAMILIES for layout in LAYOUTS]),
)
@pytest.mark.slow
def test_n_ranks_equal_one(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, family: str, layout: str
) -> None:
    changes = LAYOUTS[layout]
    world = changes["parallel.ep"] * changes.get("parallel.edp", 1)
    ((one, ready),) = run_in_world(1, steps, str(tiny_data), str(tmp_path / "1"), of_family(family), ONE)
    results = run_in_world(world, steps, str(tiny_data), str(tmp_path / "n"), of_family(family), changes)
    assert ready == (family not in ("gpt_oss", "lfm2_moe"), family in ("deepseek_v3", "lfm2_moe"))
    for reports, also in results:
        assert also == ready
        for found, expected in zip(reports, one, strict=True):
            for key in ("loss", "norm", "balance", "z"):
                assert float(found[key]) == pytest.approx(float(expected[key]), rel=1e-9), key
            assert found["choices"].tolist() == expected["choices"].tolist()
    sent = [reports[-1]["rows"]["rows_remote"] for reports, _ in results]
    assert all(rows > 0 for rows in sent) or changes["parallel.ep"] == 1


def without_tokens(rank: RankContext, data: str, root: str, changes: Mapping[str, Any]) -> list[Tensor]:
    """Takes one step in which every token chooses expert 0, so that the second rank gets no rows. Returns gradients."""
    torch.set_num_threads(1)
    config = hosted_config(data, root, of_family("granitemoe"), changes)
    with built_run(config, world_size=rank.world_size) as run:
        model: Any = run.training.parallel.model
        for layer in model.moe_modules():
            choose = layer.router._choose
            layer.router._choose = lambda *inputs, choose=choose: _all_zero(choose(*inputs))
        gradients: list[Tensor] = []

        def keep(*_: Any) -> None:
            grads = (each.parameter.grad for each in run.training.parallel.parameters)
            gradients.extend(each.clone() for each in grads if each is not None)

        run.training.step._apply = keep  # pyright: ignore[reportAttributeAccessIssue]
        take_steps(run, 0, 1)
        return gradients


def _all_zero(chosen: Any) -> Any:
    first_TK = torch.zeros_like(chosen.true_TK)
    first_TK[:, 0] = chosen.true_TK[:, 0]
    return chosen._replace(column_TK=torch.zeros_like(chosen.column_TK), true_TK=first_TK, valid_TK=first_TK)


@pytest.mark.parametrize("recompute", ["none", "experts", "block"])
def test_a_rank_without_tokens_does_not_hang(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, recompute: str
) -> None:
    """Rank 0 has expert 0 and gets all rows. Rank 1's backward, with or without recompute, must make the same exchanges."""
    changes = {**UNEVEN, "parallel.recompute": recompute}
    first, second = run_in_world(2, without_tokens, str(tiny_data), str(tmp_path), changes)
    assert any(bool(each.any()) for each in first)
    assert len(first) == len(second)


def own_losses(family: Any, batch: Batch) -> Tensor:
    """Reference: the losses of transformers' own model, which sees one document at a time."""
    losses_BS = torch.zeros(batch.tokens_BS.shape)
    for b in range(len(batch.tokens_BS)):
        for document in batch.documents_BS[b].unique():
            (at,) = torch.where(batch.documents_BS[b] == document)
            logits_1SV = family(input_ids=batch.tokens_BS[b, at][None]).logits.float()
            labels_S = batch.labels_BS[b, at]
            losses_BS[b, at] = F.cross_entropy(logits_1SV[0], labels_S, ignore_index=IGNORED, reduction="none")
    return losses_BS


def from_folder(
    rank: RankContext, data: str, root: str, folder: str, changes: Mapping[str, Any]
) -> tuple[float, list[dict[str, Any]], set[Role]]:
    """Starts a run from a folder's weights, takes two steps and saves. Returns the largest difference between the run's
    initial losses and transformers', the steps' reports, and the roles of the weights that changed."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    with built_run(hosted_config(data, root, {"folder": folder}, changes), world_size=rank.world_size) as run:
        saver = run.saver()
        progress = saver.restore()
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        difference = initial_difference(run, own) if progress.step == 0 else 0.0
        before = [each.parameter.detach().clone() for each in run.training.parallel.parameters]
        reports = take_steps(run, progress.step, 2)
        if progress.step == 0:
            saver.save(Progress(step=2, position=2 * run.config.train.global_batch), durable=True)
        both = zip(run.training.parallel.parameters, before, strict=True)
        return difference, reports, {now.role for now, old in both if bool((now.parameter != old).any())}


@torch.no_grad()
def initial_difference(run: Run, own: Any) -> float:
    model, batch = run.training.parallel.model, run.loader.batches(0)[0]
    model.eval()
    losses_BS, _ = forward(model, batch, run.training.step.group_of_modality, losses=True)
    model.train()
    expected_BS = torch.where(batch.padding_BS, 0.0, own_losses(own, batch))
    return float((torch.where(batch.padding_BS, 0.0, losses_BS) - expected_BS).abs().max())


@pytest.mark.parametrize(
    ("family", "layout"),
    full_unless(
        lambda *case: case in {("deepseek_v3", "uneven"), ("granitemoe", "fsdp2")},
        [(family, layout) for family in FAMILIES for layout in ("uneven", "fsdp2")],
    ),
)
@pytest.mark.slow
def test_a_folder_is_read_trained_and_written(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, family: str, layout: str
) -> None:
    """Two ranks with 5 and 3 experts, or with shards of all experts, start with the losses of transformers. The checkpoint
    is exported. transformers then loads the weights that one rank loads from the checkpoint."""
    from transformers import AutoModelForCausalLM

    folder, out = tmp_path / "folder", tmp_path / "out"
    made_folder(family, folder)
    for difference, *_ in run_in_world(2, from_folder, str(tiny_data), str(tmp_path), str(folder), LAYOUTS[layout]):
        assert difference < 2e-6
    run = find_trained(tmp_path / "tiny")
    model: Any = run.load(torch.device("cpu"))
    write_folder(model, out)
    trained = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    expected, found = model.family.state_dict(), trained.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert any(not torch.equal(found[name], before[name]) for name in found)


@pytest.mark.parametrize(
    ("only", "family", "layout"),
    [
        ("routers", "deepseek_v3", "uneven, recompute=block"),
        ("experts", "qwen3_moe", "ep2, fsdp2, recompute=experts"),
        full("routers", "gpt_oss", "ep2, fsdp2, recompute=experts"),
        full("experts", "gpt_oss", "uneven, recompute=block"),
    ],
)
@pytest.mark.slow
def test_a_part_is_trained_alone(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, only: str, family: str, layout: str
) -> None:
    """All other weights stay bit-equal, and N ranks equal one rank."""
    made_folder(family, tmp_path / "folder")
    changes = {"train.only": only, "optimizer.weight_decay": 0.1}
    if only == "experts":
        changes |= {"loss.z": 0.0, "loss.balance.schedule": ((0, 0.0),)}
    folder, world = str(tmp_path / "folder"), LAYOUTS[layout].get("parallel.edp", 1) * 2
    ((_, one, _),) = run_in_world(1, from_folder, str(tiny_data), str(tmp_path / "1"), folder, {**ONE, **changes})
    many = run_in_world(world, from_folder, str(tiny_data), str(tmp_path / "n"), folder, {**LAYOUTS[layout], **changes})
    for _, reports, roles in many:
        assert roles == {Role.ROUTER if only == "routers" else Role.EXPERT}
        for key in ("loss", "norm", "balance"):
            expected = [float(each[key]) for each in one]
            assert [float(each[key]) for each in reports] == pytest.approx(expected, rel=2e-5), key


def made_folder(family: str, folder: Path, seed: int = 0, **changes: Any) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**FAMILIES[family], **changes})).save_pretrained(folder)


def controlled(
    rank: RankContext, data: str, root: str, model: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Takes three steps and saves. Returns a report of each step, and the selection biases."""
    torch.set_num_threads(1)
    with built_run(hosted_config(data, root, model, changes), world_size=rank.world_size) as run:
        saver = run.saver()
        saver.restore()
        reports = take_steps(run, 0, 3)
        saver.save(Progress(step=3, position=3 * run.config.train.global_batch), durable=True)
        return reports, biases(run.training.parallel.model)


def biases(model: Any) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.family.named_buffers() if name.endswith("bias")}


@pytest.mark.parametrize("family", ["deepseek_v3", full("lfm2_moe")])
@pytest.mark.slow
def test_selection_biases_are_controlled(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, family: str
) -> None:
    """The controller changes the family's own bias buffers, equally on all ranks, and thereby the choices."""
    moe = {"router": {"selection_bias": True}, "balance": [{"kind": "loss_free", "rate": 0.1}]}
    model = {**of_family(family), "moe": {**moe, "groups": {"experts": {"modalities": ["text", "image"]}}}}
    ((free, _),) = run_in_world(1, steps, str(tiny_data), str(tmp_path / "0"), of_family(family), ONE)
    ((one, expected),) = run_in_world(1, controlled, str(tiny_data), str(tmp_path / "1"), model, ONE)
    assert one[-1]["choices"].tolist() != free[-1]["choices"].tolist()
    for reports, found in run_in_world(2, controlled, str(tiny_data), str(tmp_path / "n"), model, UNEVEN):
        assert [each["choices"].tolist() for each in reports] == [each["choices"].tolist() for each in one]
        assert [float(each["norm"]) for each in reports] == pytest.approx([float(each["norm"]) for each in one], rel=2e-5)
        assert all(bool(each.any()) and torch.equal(each, expected[name]) for name, each in found.items())
    saved = biases(find_trained(tmp_path / "n" / "tiny").load(torch.device("cpu")))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def resumed(
    rank: RankContext, data: str, root: str, model: Mapping[str, Any], changes: Mapping[str, Any], save_at: int | None
) -> list[dict[str, Any]]:
    """Trains from the newest checkpoint (or from the start) to step 4. Saves after step `save_at`."""
    torch.set_num_threads(1)
    config = hosted_config(data, root, model, changes)
    with built_run(config, world_size=rank.world_size) as run:
        saver = run.saver()
        progress = saver.restore()
        reports = take_steps(run, progress.step, save_at or 4)
        if save_at is not None:
            saver.save(Progress(step=save_at, position=save_at * run.config.train.global_batch), durable=True)
            reports += take_steps(run, save_at, 4)
        return reports


TOP_P = {
    "model.moe.router": {"kind": "top_p", "p": 1.0, "normalise": "true_chosen"},
    "model.moe.balance": [{"kind": "active_experts", "target": {"experts": 1.5}, "rate": 5.0}],  # at first 3 per token
}
NULLS = {"moe": {"groups": {"experts": {"modalities": ["text", "image"], "num_null": 8, "top_k": 3}}}}
RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": (of_family("qwen3_moe"), {}),
    "muon": (of_family("qwen3_moe"), {"optimizer.kind": "muon"}),
    "top_p": (of_family("qwen3_moe"), {**TOP_P, "parallel.recompute": "block"}),
    "nulls": ({**of_family("mixtral"), **NULLS}, {}),
}


@pytest.mark.parametrize("rule", ["adamw", full("muon"), "top_p", "nulls"])
@pytest.mark.slow
def test_a_run_goes_on(run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, rule: str) -> None:
    """A run of two ranks with 5 and 3 experts is saved after step 2. Resumed on the same layout, it is bit-equal. Resumed
    with FSDP2 and 8 experts per rank, its losses differ only by rounding."""
    model, more = RULES[rule][0], {"loss.balance.scope": "step", **RULES[rule][1]}
    reports = run_in_world(2, resumed, str(tiny_data), str(tmp_path), model, {**UNEVEN, **more}, 2)[0]
    again = run_in_world(2, resumed, str(tiny_data), str(tmp_path), model, {**UNEVEN, **more}, None)[0]
    other = run_in_world(2, resumed, str(tiny_data), str(tmp_path), model, {**FSDP2, **more}, None)[0]
    whole = reports[2:]
    if rule == "top_p":
        assert reports[-1]["rows"]["rows_remote"] < 0.8 * reports[0]["rows"]["rows_remote"]
    assert [each["choices"].tolist() for each in other] == [each["choices"].tolist() for each in whole]
    for key in ("loss", "norm", "balance"):
        assert [each[key] for each in again] == [each[key] for each in whole], key
        assert [float(each[key]) for each in other] == pytest.approx([float(each[key]) for each in whole], rel=1e-5), key
    exported = invoke(export_hf.main, tmp_path / "tiny", "--out", tmp_path / "out")
    assert exported.exit_code == (0 if rule in ("adamw", "muon") else 78)  # transformers has neither top-p nor null experts


@pytest.mark.slow
def test_moved_experts_change_no_loss(run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path) -> None:
    """After step 2, experts move between two ranks. The losses differ from those of a run without moves only by rounding.
    If the run stops after step 3 and resumes, its losses are bit-equal."""
    changes = {
        **CHANGES,
        "model": hosted_config(tiny_data, tmp_path, of_family("olmoe"), {}).model.model_dump(mode="json"),
        "train.global_batch": 16,
        "checkpoint.every": 3,
    }
    moving = {**changes, "rank_balance": {"moving": {"every": 2, "flops_per_byte": 1e-3}}}

    def run(name: str, changes: Mapping[str, Any], steps: int) -> list[WholeRun]:
        return run_in_world(2, whole_run, tiny_data, tmp_path, {**changes, "run.name": name, "train.steps": steps})

    plain, moved = run("plain", changes, 5), run("moved", moving, 5)
    lever: Any = open_checkpoint(tmp_path / "moved/checkpoints/step_5").state.values["levers"]["moving"]
    assert lever["slots"] != lever["configured"]
    expected = [each.nll_M for each in plain[0].steps]
    np.testing.assert_allclose([each.nll_M for each in moved[0].steps], expected, rtol=1e-5)
    run("stopped", moving, 3)
    for ours, theirs in zip(run("stopped", moving, 5), moved, strict=True):
        assert [each.nll_M.tolist() for each in ours.steps] == [each.nll_M.tolist() for each in theirs.steps[3:]]
        assert ours.evaluation.loss == theirs.evaluation.loss
