"""The command on a run of a small data set of one's own: what it prints and writes, and what it refuses before it works."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from moe_dist.config.routers.base import RouterSection
from moe_dist.config.routers.expert_choice import ExpertChoiceRouterSection
from moe_dist.formats.manifest import load_manifest, write_manifest
from moe_dist.inference.loaded_run import LoadedRun, causal_problems, find_trained
from moe_dist.inference.tasks import choose_captions
from moe_dist.inference.vocabulary import picture_of
from tests.support.invoked import invoke
from tests.support.one_rank import OneRank, world_of_one
from tests.support.pictured import pictured_data, pictured_run
from tests.support.tiny import tiny_config
from tools.generate import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures with captions, and 30 texts."""
    return pictured_data(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two steps, with depths; not to be written to."""
    return pictured_run(data, tmp_path_factory.mktemp("runs"))


def call(*arguments: object) -> Result:
    return invoke(main, *arguments)


def test_text_goes_on_and_its_tokens_are_known(run: Path, tmp_path: Path) -> None:
    options = ("--prompt", "text 1", "--samples", 3, "--tokens", 20, "--out", tmp_path, "--json")
    done = call(run, *options)
    assert done.exit_code == 0, done.output
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(samples) == 3
    for sample in samples:
        assert len(sample["tokens"]) == len(sample["modalities"]) <= 20
        assert set(sample["modalities"]) <= {"text", "image"}
    assert call(run / "checkpoints" / "step_2", *options).stdout == done.stdout  # the same run, the same seed
    assert call(run, *options, "--seed", 1).stdout != done.stdout
    assert call(run, "--prompt", "text 1", "--tokens", 5).stdout.startswith("text 1")


def test_a_caption_is_drawn(run: Path, tmp_path: Path) -> None:
    done = call(run, "--prompt", "odd picture", "--draw", "--samples", 2, "--guidance", 2, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample_0_0.png", "sample_1_0.png"]
    assert Image.open(tmp_path / "sample_0_0.png").size == (256, 256)
    assert f"{tmp_path / 'sample_1_0.png'}: odd picture" in done.stdout


def test_pictures_of_an_earlier_call_stay(run: Path, tmp_path: Path) -> None:
    call(run, "--prompt", "odd picture", "--draw", "--samples", 2, "--out", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = call(run, "--prompt", "even picture", "--draw", "--seed", 1, "--out", tmp_path)
    assert f"{tmp_path / 'sample_2_0.png'}: even picture" in done.stdout
    assert {path: path.read_bytes() for path in before} == before


def test_a_picture_is_described_from_a_file_or_by_number(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    for picture in (tmp_path / "red.png", 1):
        done = call(run, "--picture", picture, "--prompt", "even", "--tokens", 6, "--json")
        assert done.exit_code == 0, done.output
        sample = json.loads(done.stdout.splitlines()[-1])
        assert set(sample["modalities"]) == {"text"}
        assert sample["pictures"] == []


def test_a_sheet_has_the_held_out_captions(run: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "deep" / "sheet.png"
    done = call(run, "--sheet", sheet, "--captions", 3, "--samples", 2)
    assert done.exit_code == 0, done.output
    assert "2 drawings of each of 3 held-out captions" in done.stdout
    first = sheet.read_bytes()
    assert Image.open(sheet).width > 3 * 96 * 2
    assert call(run, "--sheet", sheet, "--captions", 3, "--samples", 2).exit_code == 0
    assert sheet.read_bytes() == first
    both = call(run, "--sheet", sheet, "--captions", 3, "--samples", 2, "--originals")
    assert "3 held-out captions, beside the held-out picture" in both.stdout.replace("\n", " ")
    vocabulary = find_trained(run, step=None, data=None, allow=lambda _: []).vocabulary()
    caption = choose_captions(vocabulary.heldout(), 3, starting="", seed=0)[0]
    original = next(found.codes for found in vocabulary.heldout() if found.caption == caption)
    expected = np.asarray(picture_of(original, vocabulary.codebook).resize((96, 96), Image.Resampling.NEAREST), np.float64)
    shown = np.asarray(Image.open(sheet).convert("RGB").crop((12, 12, 108, 108)), np.float64)
    assert np.abs(shown - expected).mean() < 8  # the sheet has fewer colours
    assert np.abs(shown - np.asarray(Image.open(io.BytesIO(first)).convert("RGB").crop((12, 12, 108, 108)))).mean() > 8


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 78, "no --prompt, --picture or --sheet: give --prompt"),
        (("--picture", "x.png", "--draw"), 78, "--picture --draw: give --prompt"),
        (("--sheet", "x.png", "--prompt", "a"), 78, "--prompt --sheet: give"),
        (("--picture", "nowhere.png"), 78, "--picture nowhere.png: no such file"),
        (("--picture", "999"), 78, "--picture 999: there are"),
        (("--prompt", "a", "--draw", "--originals"), 78, "--originals: stands on a sheet; give --sheet as well"),
        (("--sheet", "x.png", "--starting", "xyz"), 78, "--starting 'xyz': none of the held-out captions"),
        (("--prompt", "a", "--tokens", "96"), 78, "more than model.max_seq_len=96"),
        (("--prompt", "a word " * 60, "--draw"), 78, "model.max_seq_len=96, the longest the model is made for; shorten"),
        (("--prompt", "a", "--step", "7"), 78, "has checkpoints of the steps 2; take one of them"),
        (("--prompt", "a", "--top-p", "0"), 78, "top_p=0.0"),
        (("--prompt", "a", "--draw", "--guidance", "-1"), 78, "guidance=-1.0"),
        (("--prompt", "a", "--device", "tpu"), 78, "--device tpu"),
        (("--prompt", "a", "--data", "nowhere"), 78, "no manifest.json there"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.setattr(LoadedRun, "load", lambda *_: pytest.fail("the model was loaded"))
    done = call(run, *options)
    assert done.exit_code == code, done.output
    assert message in done.stderr


def test_a_run_without_checkpoint_says_so(tmp_path: Path) -> None:
    done = call(tmp_path, "--prompt", "a")
    assert (done.exit_code, "contains no checkpoint" in done.stderr) == (78, True)


def test_data_without_tokenizer_or_codebook_are_named(tiny_data: Path, tmp_path: Path) -> None:
    with world_of_one():
        other = OneRank(tiny_data, tmp_path)
        other.train_and_save()
    for options in (("--prompt", "a"), ("--prompt", "a", "--draw"), ("--picture", 0)):
        done = call(other.folder.parent, *options)
        assert done.exit_code == 78, done.output
        assert "names no tokenizer" in done.stderr or "has no image.codebook" in done.stderr


def test_other_data_are_refused(run: Path, data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    assert call(run, "--prompt", "a", "--data", moved).exit_code == 0
    manifest = load_manifest(moved)
    write_manifest(manifest.model_copy(update={"eos_id": 4}), moved)
    done = call(run, "--prompt", "a", "--data", moved)
    assert (done.exit_code, "not the data that" in done.stderr) == (65, True)


def test_only_routers_that_route_each_token_by_itself_generate(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path)
    assert causal_problems(config) == []

    def problems(router: RouterSection) -> list[str]:
        moe = config.model.moe.model_copy(update={"router": router})
        return causal_problems(config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})}))

    assert problems(ExpertChoiceRouterSection(kind="expert_choice", causal="threshold")) == []
    (fault,) = problems(ExpertChoiceRouterSection(kind="expert_choice"))
    assert fault.startswith("model.moe.router.causal=null: the choice of experts looks at later tokens")
