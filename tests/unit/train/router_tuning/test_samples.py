"""Samples are read as they were written, successful ones first. An incomplete or changed folder is refused with the file's
name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_dist.errors import ConfigError, DataError, MoeDistError
from moe_dist.formats.manifest import write_manifest
from moe_dist.formats.tuning_manifest import ARRAYS, TuningManifest
from moe_dist.train.router_tuning.samples import Samples, Scored, TuningSample, write_samples
from tests.support.messages import refused
from tests.support.tuning_samples import made_samples


def facts() -> TuningManifest:
    zeros = dict.fromkeys(("step", "samples", "right", "longest", "columns", "width"), 0)
    texts = {"checkpoint": "0" * 64, "run": "r", "tokenizer": "1" * 64, "embedder": "2" * 64, "embedder_name": "e"}
    return TuningManifest(**texts, **zeros, model={}, tasks={}, layers=(3, 4), options={}, digests={})  # pyright: ignore


def scored() -> list[Scored]:
    """Returns four samples whose (prompt, answer) lengths are (1, 2), (2, 1), (3, 2) and (4, 1). The second and the fourth
    are right."""
    return [
        Scored(
            "a" if n < 3 else "b",
            str(n),
            f"text {n}",
            TuningSample(np.arange(n + 1) + 10 * n, np.arange(2 - n % 2)),
            n % 2 == 1,
        )
        for n in range(4)
    ]


def test_what_was_written_comes_back_with_the_right_ones_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    embeddings, routing = rng.normal(size=(4, 3)), rng.random((4, 2, 5))
    manifest = write_samples(tmp_path / "out", scored(), embeddings, routing, facts())
    samples = Samples(tmp_path / "out")
    assert samples.manifest == manifest
    assert (manifest.samples, manifest.right, manifest.longest, manifest.columns, manifest.width) == (4, 2, 4, 5, 3)
    assert {name: (each.questions, each.right) for name, each in manifest.tasks.items()} == {"a": (3, 1), "b": (1, 1)}
    for row, source in enumerate((1, 3, 0, 2)):
        sample, wanted = samples.sample(row), scored()[source].sample
        np.testing.assert_array_equal(sample.prompt, wanted.prompt)
        np.testing.assert_array_equal(sample.answer, wanted.answer)
        np.testing.assert_array_equal(samples.embeddings_SE[row], embeddings[source].astype(np.float32))
        np.testing.assert_array_equal(samples.routing_SLC[row], routing[source].astype(np.float32))
    lines = [json.loads(line) for line in (tmp_path / "out/questions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["1", "3", "0", "2"]
    assert isinstance(samples.embeddings_SE, np.memmap)
    assert isinstance(samples.routing_SLC, np.memmap)


def test_nothing_is_overwritten(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    with refused(ConfigError):
        write_samples(folder, scored(), np.zeros((4, 3)), np.zeros((4, 2, 5)), facts())
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("at", range(6))
def test_what_is_interrupted_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The write is interrupted at each array, before the manifest, and before the rename. A killed process also leaves its
    hidden folder behind."""
    calls = []

    def until(action: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **options: object) -> object:
            if len(calls) == at:
                raise KeyboardInterrupt
            calls.append(action)
            return action(*arguments, **options)

        return counted

    with monkeypatch.context() as patched:
        patched.setattr("moe_dist.train.router_tuning.samples.np.save", until(np.save))
        patched.setattr("moe_dist.train.router_tuning.samples.write_manifest", until(write_manifest))
        patched.setattr("moe_dist.train.router_tuning.samples.Path.rename", until(Path.rename))
        patched.setattr("moe_dist.train.router_tuning.samples.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write_samples(tmp_path / "out", scored(), np.zeros((4, 3)), np.zeros((4, 2, 5)), facts())
    assert not (tmp_path / "out").exists()
    write_samples(tmp_path / "out", scored(), np.zeros((4, 3)), np.zeros((4, 2, 5)), facts())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def pickled(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([{}], object), allow_pickle=True)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if path.suffix == ".npy" else 0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*ARRAYS, "questions.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, flipped, lambda path: path.write_bytes(b"{}"), pickled])
def test_each_missing_or_damaged_file_is_named(
    folder: Path, tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    damage(broken / name)
    with pytest.raises(MoeDistError, match=name):
        Samples(broken)


def test_arrays_are_held_against_the_manifest(tmp_path: Path) -> None:
    folder = made_samples(tmp_path / "made", ids=(0, 9), layers=(0,), columns=3, model={})
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    for key, value, name in (("columns", 4, "routing.npy"), ("width", 7, "embeddings.npy"), ("samples", 21, "lengths.npy")):
        path.write_text(json.dumps({**values, key: value}))
        with pytest.raises(DataError, match=name):
            Samples(folder)
    path.write_text(json.dumps({**values, "right": 99}))
    with refused(DataError, "right=99"):
        Samples(folder)
