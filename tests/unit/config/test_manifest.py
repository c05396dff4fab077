"""Errors about a data set's manifest name every fault, and unknown keys are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import load_manifest, write_manifest
from tests.support.messages import refused


def values(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "vocab_size": 64,
        "modalities": {"text": [[0, 48]], "image": [[48, 64]]},
        "pad_id": 0,
        "eos_id": 1,
        "image": {"grid": [4, 4], "begin_id": 2, "end_id": 3},
        "sources": {
            "prose": {
                "train": {"path": "train", "documents": 3, "tokens": 10, "tokens_by_modality": {"text": 9, "image": 1}},
                "licence": "CC0-1.0",
            }
        },
        **changes,
    }


def write(folder: Path, content: Any) -> Path:
    (folder / "manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_reads_and_writes(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path, values()))
    assert [key for key, _ in manifest.splits()] == ["sources.prose.train"]
    write_manifest(manifest, tmp_path)
    assert load_manifest(tmp_path) == manifest


def test_several_ranges_of_one_modality(tmp_path: Path) -> None:
    several = values(modalities={"text": [[0, 10], [26, 64]], "image": [[10, 26]]})
    assert load_manifest(write(tmp_path, several)).modalities["text"] == ((0, 10), (26, 64))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"vocab_size": 60}, ["modalities.image: [48, 64) lies outside [0, vocab_size=60)"]),
        ({"vocab_size": 70}, ["cover ids below 64 only, but vocab_size=70"]),
        (
            {"modalities": {"text": [[0, 40]], "image": [[48, 64]]}},
            ["image: [48, 64) leaves a gap after the range that ends at 40"],
        ),
        ({"modalities": {"text": [[0, 50]], "image": [[48, 64]]}}, ["image: [48, 64) overlaps the range that ends at 50"]),
        ({"pad_id": 64, "eos_id": 99}, ["pad_id=64 lies outside", "eos_id=99 lies outside"]),
        ({"image": {"grid": [4, 4], "begin_id": 64, "end_id": 3}}, ["image.begin_id=64 lies outside"]),
        ({"vocabsize": 3}, ["vocabsize: unknown key; did you mean vocab_size?"]),
        ({"vocab_size": "64", "pad_id": -1}, ["vocab_size='64'", "pad_id=-1"]),
        ({"modalities": {"z": [[0, 64]]}}, ["the name 'z'", "choose another"]),
    ],
)
def test_every_fault_is_named(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(DataError) as raised:
        load_manifest(write(tmp_path, values(**changes)))
    assert len(raised.value.problems) == len(parts)
    for part in parts:
        assert part in str(raised.value)
    assert "docs/data.md" in str(raised.value)


@pytest.mark.parametrize("path", ["../other/train", "/etc/shadow", "a/../../b", "..", "a\nb"])
@pytest.mark.parametrize("key", ["path", "filler", "tokenizer", "codebook"])
def test_a_file_outside_the_folder_is_refused(tmp_path: Path, key: str, path: str) -> None:
    content = values()
    holder = {
        "path": content["sources"]["prose"]["train"],
        "filler": content["sources"]["prose"]["train"],
        "tokenizer": content,
        "codebook": content["image"],
    }[key]
    holder[key] = path
    with pytest.raises(DataError) as raised:
        load_manifest(write(tmp_path, content))
    (fault,) = raised.value.problems
    assert key in fault
    assert "leads out of the data set's folder" in fault or "without control characters" in fault
    holder[key] = "part/a..b"
    load_manifest(write(tmp_path, content))


def test_counts_by_modality_must_add_up(tmp_path: Path) -> None:
    content = values()
    content["sources"]["prose"]["train"]["tokens_by_modality"] = {"text": 9}
    with refused(DataError, "tokens=10"):
        load_manifest(write(tmp_path, content))
    content["sources"]["prose"]["train"]["tokens_by_modality"] = {"txt": 10}
    with refused(DataError):
        load_manifest(write(tmp_path, content))


@pytest.mark.parametrize("content", ["{", "[1]", '"x"', ""])
def test_no_manifest_at_all(tmp_path: Path, content: str) -> None:
    with refused(DataError, "manifest.json"):
        load_manifest(write(tmp_path, content))


def test_missing_data_names_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "not there; touch x"
    with pytest.raises(ConfigError) as raised:
        load_manifest(folder)
    assert f"moe-dist prepare-data --out '{folder}'" in str(raised.value)  # quoted for the shell
