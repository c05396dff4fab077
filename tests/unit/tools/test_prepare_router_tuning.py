"""Prepares samples of router tuning with a small run. The samples agree with the run's answers to the questions, and
bad input is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_dist.formats.tuning_manifest import load_tuning_manifest
from moe_dist.inference.loaded_run import LoadedRun, find_trained
from moe_dist.train.objective.loss import forward
from moe_dist.train.router_tuning.loader import SampleMaker
from moe_dist.train.router_tuning.samples import Samples
from tests.support.invoked import invoke
from tests.support.pictured import pictured_run
from tests.support.tiny_embedder import tiny_embedder
from tools.evaluate import main as evaluate
from tools.prepare_router_tuning import main

pytestmark = pytest.mark.slow

TASKS = "nouns-definition,nouns-category"


@pytest.fixture(scope="module")
def plain_run(own_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured_run(own_data, tmp_path_factory.mktemp("plain"), max_seq_len=192, model__mixture_of_depths=None)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_embedder(tmp_path_factory.mktemp("embedder") / "tiny")


@pytest.fixture(scope="module")
def options(questions: Path, embedder: Path) -> tuple[object, ...]:
    return ("--questions", questions, "--embedder", embedder, "--limit", 8)


@pytest.fixture(scope="module")
def prepared(plain_run: Path, options: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    done = invoke(main, plain_run, "--tasks", TASKS, "--out", out, *options, code=0)
    assert "nouns-definition: " in done.stdout
    assert f"{out}: 16 samples" in done.stdout
    assert "of 16 right choices have a first token that no wrong one has" in done.stdout
    return out


def test_success_is_what_the_evaluation_says(prepared: Path, plain_run: Path, questions: Path, tmp_path: Path) -> None:
    said = ("--split", "train", "--rotations", "--questions", questions, "--limit", 8, "--out", tmp_path, "--json")
    record = json.loads(invoke(evaluate, plain_run, "--tasks", TASKS, *said).stdout)
    wanted = {
        (task, answer["id"]): answer["normalised"] == [answer["answer"]] * 4
        for task, found in record["tasks"].items()
        for answer in found["answers"]
    }
    lines = [json.loads(line) for line in (prepared / "questions.jsonl").read_text().splitlines()]
    assert {(line["task"], line["id"]): line["right"] for line in lines} == wanted
    manifest = load_tuning_manifest(prepared)
    assert manifest.right == sum(wanted.values()) == sum(line["right"] for line in lines[: manifest.right])
    # This small tokenizer makes the space before a choice a separate token, so choices cannot be told apart by their first
    # token.
    assert len({int(Samples(prepared).sample(number).answer[0]) for number in range(16)}) == 1
    assert (manifest.choices, manifest.told) == (1, 0)


def test_routing_is_the_softmax_at_the_prompts_last_token(prepared: Path, plain_run: Path) -> None:
    """The reference runs each prompt alone, and reads the logits inside the routers."""
    samples, trained = Samples(prepared), find_trained(plain_run)
    model, groups = trained.load(torch.device("cpu")), torch.tensor(trained.group_of_modality)
    seen: list[torch.Tensor] = []

    def look(router: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        seen.append(router._logits(inputs[0])[-1].detach())

    for layer in model.moe_modules():
        layer.router.register_forward_hook(look)
    text = np.array([group == 0 for group in model.moe_modules()[0].router.group_of_column_C.tolist()])  # pyright: ignore
    for number in range(len(samples)):
        seen.clear()
        sample = samples.sample(number)
        batch = SampleMaker(trained.manifest).make([type(sample)(sample.prompt, sample.answer[:1])])
        with torch.no_grad():
            forward(model, batch, groups)
        for layer, logits_C in enumerate(seen):
            wanted = np.zeros(len(logits_C))
            wanted[text] = torch.softmax(logits_C[torch.from_numpy(text)], 0).numpy()
            np.testing.assert_allclose(samples.routing_SLC[number, layer], wanted, atol=1e-6)


def test_without_rotations_choices_are_not_listed(
    plain_run: Path, options: tuple[object, ...], prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "unlisted"
    invoke(main, plain_run, "--tasks", TASKS, "--out", out, "--no-rotations", "--layers", "1", *options, code=0)
    assert "; " not in json.loads((out / "questions.jsonl").read_text().splitlines()[0])["text"]
    manifest, listed = load_tuning_manifest(out), load_tuning_manifest(prepared)
    assert manifest.longest < listed.longest
    assert manifest.layers == (1,)
    assert (manifest.checkpoint, manifest.embedder) == (listed.checkpoint, listed.embedder)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--tasks", "nouns-defintion"), 78, "did you mean nouns-definition?"),
        (("--tasks", "", "--questions", ""), 78, "no questions: give --questions or --tasks"),
        (("--tasks", TASKS, "--layers", "2"), 78, "--layers 2: must be some of the MoE layers 0, 1"),
        (("--tasks", TASKS, "--embedder", "nowhere"), 78, "--embedder nowhere: no modules.json there"),
        (("--tasks", "pictures-naming", "--no-rotations"), 78, "--tasks pictures-naming: its questions are pictures alone"),
        (("--tasks", TASKS, "--out", "."), 78, "--out .: exists already, and nothing is overwritten"),
        (("--tasks", TASKS, "--out", "/proc/self/x/out"), 78, "--out /proc/self/x/out: not writable: "),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    plain_run: Path,
    options: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(LoadedRun, "load", lambda *_: pytest.fail("the model was loaded"))
    assert message in invoke(main, plain_run, "--out", tmp_path / "out", *options, *arguments, code=code).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_a_damaged_embedder_is_refused_before_hours_of_scoring(
    plain_run: Path, options: tuple[object, ...], embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(LoadedRun, "load", lambda *_: pytest.fail("the model was loaded"))
    damaged = shutil.copytree(embedder, tmp_path / "damaged")
    (damaged / name).write_bytes(b"{}" * 50)
    done = invoke(main, plain_run, "--tasks", TASKS, "--out", tmp_path / "out", *options, "--embedder", damaged, code=65)
    assert "damaged" in done.stderr


def test_runs_without_a_routing_to_compare_and_foreign_tokenizers_are_refused(
    own_run: Path, plain_run: Path, own_data: Path, options: tuple[object, ...], tmp_path: Path
) -> None:
    done = invoke(main, own_run, "--tasks", TASKS, "--out", tmp_path / "out", *options, code=78)
    assert "model.mixture_of_depths: a token that a layer passes by" in done.stderr
    moved = shutil.copytree(own_data, tmp_path / "moved")
    tokenizer = json.loads((moved / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["foreign"] = 310
    (moved / "tokenizer.json").write_text(json.dumps(tokenizer))
    invoke(main, plain_run, "--tasks", TASKS, "--out", tmp_path / "out", "--data", moved, *options, code=65)
    assert not (tmp_path / "out").exists()
