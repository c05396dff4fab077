"""Runs the command `generate` on a run with small data of a user's own, and tests its output and files."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moe_dist.config.routers.base import RouterSection
from moe_dist.config.routers.expert_choice import ExpertChoiceRouterSection
from moe_dist.inference.loaded_run import causal_problems, find_trained
from moe_dist.inference.vocabulary import picture_of
from tests.support.invoked import invoke
from tests.support.tiny import tiny_config
from tools.generate import choose_captions, main

PADDING = {"padding": {"strategy": {"Fixed": 10**5}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                       "pad_type_id": 0, "pad_token": "<pad>"}}  # fmt: skip
_TWICE = {"type": "Replace", "pattern": {"String": "t"}, "content": "tt"}
ESCAPES = {"decoder": {"type": "Replace", "pattern": {"Regex": "."}, "content": "\x1b[2J"}}
GROWING = {"normalizer": {"type": "Sequence", "normalizers": [_TWICE] * 34}}

pytestmark = pytest.mark.slow


def test_text_goes_on_and_its_tokens_are_known(own_run: Path, tmp_path: Path) -> None:
    options = ("--prompt", "text 1", "--samples", 3, "--tokens", 20, "--out", tmp_path, "--json")
    done = invoke(main, own_run, *options, code=0)
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(samples) == 3
    for sample in samples:
        assert len(sample["tokens"]) == len(sample["modalities"]) <= 20
        assert set(sample["modalities"]) <= {"text", "image"}
    assert invoke(main, own_run / "checkpoints" / "step_2", *options).stdout == done.stdout  # same run, same seed
    assert invoke(main, own_run, *options, "--seed", 1).stdout != done.stdout
    assert invoke(main, own_run, "--prompt", "text 1", "--tokens", 5).stdout.startswith("text 1")


def test_a_caption_is_drawn(own_run: Path, tmp_path: Path) -> None:
    done = invoke(
        main, own_run, "--prompt", "odd picture", "--draw", "--samples", 2, "--guidance", 2, "--out", tmp_path, code=0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample_0_0.png", "sample_1_0.png"]
    assert Image.open(tmp_path / "sample_0_0.png").size == (256, 256)
    assert f"{tmp_path / 'sample_1_0.png'}: odd picture" in done.stdout
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = invoke(main, own_run, "--prompt", "even picture", "--draw", "--seed", 1, "--out", tmp_path)
    assert f"{tmp_path / 'sample_2_0.png'}: even picture" in done.stdout
    assert {path: path.read_bytes() for path in before} == before, "an earlier call's pictures stay"


def test_a_picture_is_described_from_a_file_or_by_number(own_run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    for picture in (tmp_path / "red.png", 1):
        done = invoke(main, own_run, "--picture", picture, "--prompt", "even", "--tokens", 6, "--json", code=0)
        sample = json.loads(done.stdout.splitlines()[-1])
        assert set(sample["modalities"]) == {"text"}
        assert sample["pictures"] == []


def test_a_sheet_has_the_held_out_captions(own_run: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "deep" / "sheet.png"
    done = invoke(main, own_run, "--sheet", sheet, "--captions", 2, "--samples", 1, code=0)
    assert "of each of 2 held-out captions" in done.stdout
    first = sheet.read_bytes()
    assert Image.open(sheet).width > 96
    both = invoke(main, own_run, "--sheet", sheet, "--captions", 2, "--samples", 1, "--originals")
    assert "2 held-out captions, beside the held-out picture" in both.stdout.replace("\n", " ")
    vocabulary = find_trained(own_run, step=None, data=None, allow=lambda _: []).vocabulary()
    caption = choose_captions(vocabulary.heldout(), 2, starting="", seed=0)[0]
    original = next(found.codes for found in vocabulary.heldout() if found.caption == caption)
    expected = np.asarray(picture_of(original, vocabulary.codebook).resize((96, 96), Image.Resampling.NEAREST), np.float64)
    shown = np.asarray(Image.open(sheet).convert("RGB").crop((12, 12, 108, 108)), np.float64)
    assert np.abs(shown - expected).mean() < 8  # the sheet has fewer colours
    assert np.abs(shown - np.asarray(Image.open(io.BytesIO(first)).convert("RGB").crop((12, 12, 108, 108)))).mean() > 8


@pytest.mark.parametrize(
    ("added", "exit_code", "message"),
    [(PADDING, 0, ""), (GROWING, 65, "the tokenizer fails on a text; give another one: "), (ESCAPES, 0, r"\x1b[2J")],
    ids=["padding", "growing", "escapes"],
)
def test_a_planted_tokenizer(
    own_run: Path, own_data: Path, tmp_path: Path, added: dict[str, object], exit_code: int, message: str
) -> None:
    """Tokenizers request padding (left out), expand a letter to 2^34 letters (stopped), or clear the terminal."""
    data = shutil.copytree(own_data, tmp_path / "data")
    values = json.loads((data / "tokenizer.json").read_text())
    (data / "tokenizer.json").write_text(json.dumps(values | added))
    done = invoke(main, own_run, "--data", data, "--prompt", "text 1", "--tokens", 5)
    assert (done.exit_code, message in done.output) == (exit_code, True), done.output


def test_only_routers_that_route_each_token_by_itself_generate(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path)
    assert causal_problems(config) == []

    def problems(router: RouterSection) -> list[str]:
        moe = config.model.moe.model_copy(update={"router": router})
        return causal_problems(config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})}))

    assert problems(ExpertChoiceRouterSection(kind="expert_choice", causal="threshold")) == []
    (fault,) = problems(ExpertChoiceRouterSection(kind="expert_choice"))
    assert fault.startswith("model.moe.router.causal=null: the choice of experts looks at later tokens")
