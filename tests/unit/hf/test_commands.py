"""Runs `moe-dist import-hf` and `moe-dist export-hf`, and tests output, options and refusals."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.invoked import invoke
from tests.support.served import saved_model
from tests.support.tiny import tiny_dataset
from tests.support.tiny_hf import save, tiny_model
from tools.export_hf import main as export_hf
from tools.import_hf import main as import_hf


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("mixtral"), tmp_path_factory.mktemp("hf") / "theirs")


@pytest.fixture(scope="module")
def imported(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ours") / "ours"
    (theirs / "training_args.bin").write_bytes(b"\x80\x04.")
    options = ("--null-experts", 8, "--top-k", 3, "--modalities", "text,image", "--data", "somewhere", "--seed", 7)
    done = invoke(import_hf, theirs, "--out", out, *options)
    assert done.exit_code == 0, done.output
    assert "not opened, since reading them can run code: training_args.bin" in done.stdout
    assert "mixtral: " in done.stdout
    assert f"train it: moe-dist launch local {out / 'config.yaml'}" in done.stdout.replace("\n", "")
    return out


def test_options_of_an_import_are_in_its_configuration(imported: Path) -> None:
    written = yaml.safe_load((imported / "config.yaml").read_text())
    (group,) = written["model"]["moe"]["groups"].values()
    assert (group["num_null"], group["top_k"], group["modalities"]) == (8, 3, ["text", "image"])
    assert (written["data"]["path"], written["run"]["seed"], written["run"]["init_from"]) == ("somewhere", 7, str(imported))


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_an_export_says_what_it_did(
    imported: Path, theirs: Path, tmp_path: Path, dtype: str | None, expected: torch.dtype
) -> None:
    done = invoke(export_hf, imported, "--out", tmp_path / "out", *(("--dtype", dtype) if dtype else ()))
    assert done.exit_code == 0, done.output
    assert "8 null experts a layer left out: they were copies of true rows" in done.stdout
    assert f"{tmp_path / 'out'} is made" in done.stdout.replace("\n", "")
    got, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", theirs))
    assert got.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(got[name], value.to(expected)), name


def test_an_export_says_why_it_brings_its_code(tmp_path: Path) -> None:
    tiny_dataset(tmp_path / "data")
    saved_model(tmp_path / "run", tmp_path / "data", {})
    done = invoke(export_hf, tmp_path / "run", "--out", tmp_path / "out", "--data", tmp_path / "data")
    assert done.exit_code == 0, done.output
    assert "no plain family of transformers can express this model:\n  - model.moe.groups: text, image: " in done.stdout
    assert "load it with trust_remote_code=True\nmoe_dist: " in done.stdout


def test_an_export_refuses_a_damaged_tokenizer(tmp_path: Path) -> None:
    tiny_dataset(tmp_path / "data")
    values = json.loads((tmp_path / "data/manifest.json").read_text())
    (tmp_path / "data/manifest.json").write_text(json.dumps(values | {"tokenizer": "t.json"}))
    (tmp_path / "data/t.json").write_text("[]")
    saved_model(tmp_path / "run", tmp_path / "data", {})
    done = invoke(export_hf, tmp_path / "run", "--out", tmp_path / "out", "--data", tmp_path / "data")
    assert (done.exit_code, "t.json': must be a tokenizer.json" in done.stderr) == (65, True), done.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--null-experts", 3, "--top-k", 3), 78, "import_hf: --null-experts=3: "),
        (("--modalities", ""), 78, "change that field, or the option that sets it"),
        (("--out", "."), 78, ". exists; nothing is overwritten"),
    ],
    ids=str,
)
def test_imports_that_are_refused(
    theirs: Path, tmp_path: Path, arguments: tuple[object, ...], code: int, message: str
) -> None:
    done = invoke(import_hf, theirs, "--out", tmp_path / "ours", *arguments)
    assert (done.exit_code, message in done.stderr) == (code, True), done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "float8"), "export_hf: --dtype=float8: must be float32, "),
        (("--family", "gpt2"), "gpt2"),
        (("--out", "."), "exists"),
        (("--adapters", "--data", ".", "--shard-mb", 1), "--data, --shard-mb: does not apply with --adapters"),
    ],
    ids=str,
)
def test_exports_that_are_refused(imported: Path, tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    done = invoke(export_hf, imported, "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 78, done.output
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_fifo_is_refused_by_name(theirs: Path, tmp_path: Path, name: str) -> None:
    planted = shutil.copytree(theirs, tmp_path / "planted")
    (planted / name).unlink()
    os.mkfifo(planted / name)
    done = invoke(import_hf, planted, "--out", tmp_path / "ours")
    assert (done.exit_code, f"{name}: is no file" in done.stderr) == (65, True), done.output
    assert not (tmp_path / "ours").exists()
