"""Before they load the model, `generate` and `evaluate` refuse options, runs and data that do not fit."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_dist.data.tokenizer import fit_tokenizer
from moe_dist.formats.manifest import load_manifest, write_manifest
from moe_dist.inference.loaded_run import LoadedRun
from tests.support.invoked import invoke
from tests.support.one_rank import OneRank, world_of_one
from tools.evaluate import main as evaluate
from tools.generate import main as generate

pytestmark = pytest.mark.slow

DRAW = ("--prompt", "a", "--draw")
NAMING = ("--tasks", "pictures-naming", "--split", "train")


@pytest.mark.parametrize(
    ("tool", "options", "message"),
    [
        (generate, (), "no --prompt, --picture or --sheet: give --prompt"),
        (generate, ("--picture", "x.png", "--draw"), "--picture --draw: give --prompt"),
        (generate, ("--sheet", "x.png", "--prompt", "a"), "--prompt --sheet: give"),
        (generate, ("--picture", "nowhere.png"), "--picture nowhere.png: no such file"),
        (generate, ("--picture", "999"), "--picture 999: there are"),
        (generate, (*DRAW, "--originals"), "--originals: stands on a sheet; give --sheet as well"),
        (generate, ("--sheet", "x.png", "--starting", "xyz"), "--starting 'xyz': none of the held-out captions"),
        (generate, ("--prompt", "a", "--tokens", "192"), "more than model.max_seq_len=192"),
        (generate, ("--prompt", "a word " * 120, "--draw"), "model.max_seq_len=192, the longest the model is made for; "),
        (generate, ("--prompt", "a", "--step", "7"), "has checkpoints of the steps 2; take one of them"),
        (generate, (*DRAW, "--guidance", "-1"), "guidance=-1.0"),
        (generate, ("--prompt", "a", "--device", "tpu"), "--device tpu"),
        (evaluate, (), "nothing to evaluate: give --tasks, --questions or --harness"),
        (evaluate, ("--tasks", "pictures-namin"), "did you mean pictures-naming? the tasks are pictures-naming, "),
        (evaluate, ("--questions", "nowhere"), "--questions nowhere: cannot be read: "),
        (evaluate, ("--tasks", "pictures-finding", "--split", "train", "--rotations"), "more than model.max_seq_len=192"),
        (evaluate, (*NAMING, "--out", "/dev/null/x"), "--out /dev/null/x: not writable"),
        (evaluate, (*NAMING, "--seed", "2", "--data", "nowhere"), "no manifest.json"),
    ],
    ids=lambda each: getattr(each, "__module__", None) or str(each),
)
def test_options_that_cannot_be(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, tool: Callable[..., None], options: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(LoadedRun, "load", lambda *_: pytest.fail("the model was loaded"))
    assert message in invoke(tool, own_run, *options, code=78).stderr


def test_packages_that_are_not_there_are_named(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "install moe_dist[evaluate]" in invoke(evaluate, own_run, "--harness", "lambada", code=78).stderr


def test_a_run_without_checkpoint_tokenizer_or_codebook(tiny_data: Path, tmp_path: Path) -> None:
    done = invoke(generate, tmp_path, "--prompt", "a")
    assert (done.exit_code, "contains no checkpoint" in done.stderr) == (78, True)
    with world_of_one():
        other = OneRank(tiny_data, tmp_path)
        other.train_and_save()
    for tool, options in ((generate, DRAW[:2]), (generate, DRAW), (generate, ("--picture", 0)), (evaluate, NAMING)):
        done = invoke(tool, other.folder.parent, *options, code=78)
        assert "names no tokenizer" in done.stderr or "has no image.codebook" in done.stderr


def test_other_data(own_run: Path, own_data: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(own_data, tmp_path / "moved")
    assert invoke(generate, own_run, "--prompt", "a", "--data", moved).exit_code == 0
    tokenizer, manifest = (moved / "tokenizer.json").read_bytes(), load_manifest(moved)
    texts = [" ".join(f"{number:03} brown foxes" for number in range(60))]
    fit_tokenizer(texts, vocab_size=310).save(str(moved / "tokenizer.json"))
    done = invoke(evaluate, own_run, *NAMING[:2], "--data", moved, code=65)
    assert "to the data that is a picture code; it is another data set's tokenizer" in done.stderr
    (moved / "tokenizer.json").write_bytes(tokenizer)
    write_manifest(manifest.model_copy(update={"eos_id": 4}), moved)
    done = invoke(generate, own_run, "--prompt", "a", "--data", moved)
    assert (done.exit_code, "not the data that" in done.stderr) == (65, True)
