import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint.fits import check_fits
from moe_dist.checkpoint.index import (
    Chunk,
    Entry,
    Index,
    ShardEntry,
    StateFile,
    StoredModel,
    index_problems,
    read_index,
    read_stored,
)
from moe_dist.checkpoint.state import TensorSpec
from moe_dist.errors import ConfigError, DataError
from tests.support.messages import refused
from tests.support.special_files import reads_little


def entry(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]], dtype: str = "F32") -> Entry:
    chunks = tuple(Chunk(shard=i, offsets=offsets, shape=size) for i, (offsets, size) in enumerate(boxes))
    return Entry(dtype=dtype, shape=shape, fingerprint="0" * 16, chunks=chunks)


def index(**tensors: Entry) -> Index:
    return Index(save_id="a", step=1, shards=(ShardEntry(size=8, header_sha256=""),) * 4, tensors=tensors)


@pytest.mark.parametrize(
    "bad",
    [
        entry((4, 6)),  # no box
        entry((4, 6), ((0, 0), (3, 6))),  # end missing
        entry((4, 6), ((1, 0), (3, 6))),  # begin missing
        entry((4, 6), ((0, 0), (1, 6)), ((2, 0), (2, 6))),  # hole
        entry((4, 6), ((0, 0), (3, 6)), ((2, 0), (2, 6))),  # overlap
        entry((4, 6), ((0, 0), (4, 6)), ((0, 0), (4, 6))),  # the same box twice
        entry((4, 6), ((0, 0), (5, 6))),  # box too long
        entry((4, 6), ((0, 1), (4, 6))),  # box shifted
        entry((4, 6), ((0, 0), (2, 3)), ((2, 3), (2, 3))),  # two opposite corners
        entry((4, 6), ((0,), (4,))),  # wrong number of dimensions
        entry((4, 6), *[((i, 0), (1, 6)) for i in range(4)], ((0, 0), (0, 6))),  # an empty box in a missing shard
        entry((4, 6), ((0, 0), (4, 6)), dtype="F8"),
    ],
)
def test_boxes_that_do_not_tile_a_tensor_are_named(bad: Entry) -> None:
    problems = index_problems(index(good=entry((2,), ((0,), (2,))), bad=bad))
    assert problems
    assert all(fault.startswith("bad: ") for fault in problems)


def test_a_missing_or_damaged_index_is_a_data_error(tmp_path: Path) -> None:
    good = index(w=entry((2,), ((0,), (2,))))
    with refused(DataError, "index.json"):
        read_index(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(good.model_dump_json())
    assert read_index(tmp_path) == good
    text = good.model_dump_json()
    for damage in (text[:-9], text.replace('"F32"', "7"), text.replace("[2]", "[-2]"), text.replace("[2]", "[3]", 1)):
        path.write_text(damage)
        with refused(DataError, "index.json"):
            read_index(tmp_path)


STATE = (
    '{"save_id": "a", "step": 2, "world_size": 1, "optimizer_steps": 2, "placement": {}, "versions": {}, "values": {%s}}'
)
INDEX = '{"save_id": "a", "step": 1, "shards": [], "tensors": {%s}}'
CHUNK = '{"shard": 0, "offsets": [0], "shape": [1]}'
ENTRY = '"w": {"dtype": "F32", "shape": [1], "fingerprint": "0000000000000000", "chunks": [%s]}'


@pytest.mark.parametrize(
    ("model", "text", "told"),
    [
        (StateFile, STATE % f'"x": [{"[]," * 5_000_000}[]]', "5,000,00"),
        (StateFile, STATE % f'"x": [{"1," * 20_000_000}1]', "20,000,00"),
        (StateFile, STATE % f'"config": [{"1," * 100_000}1]', "config has more than"),
        (StateFile, STATE % f'"x": {"[" * 10_000}', "recursion"),
        (Index, INDEX % ",".join(f'"{number}": {{}}' for number in range(300_000)), "dtype"),
        (Index, INDEX % ENTRY % ",".join(["{}"] * 300_000), "chunks.0.shard"),
        (Index, INDEX % ENTRY % CHUNK.replace("[1]", f"[{'9,' * 100_000}1]"), "shape"),
        (Index, INDEX.replace('"step": 1', '"step": "' + "x" * 1_000_000 + '"') % "", "step"),
    ],
    ids=["lists", "values", "config", "nested", "entries", "chunks", "dims", "text"],
)
def test_a_gigantic_file_is_refused_at_once_and_in_few_words(
    tmp_path: Path, model: type[StoredModel], text: str, told: str
) -> None:
    (tmp_path / "file.json").write_text(text)
    with reads_little(), refused(DataError, told, golden=False) as raised:
        read_stored(tmp_path / "file.json", model)
    assert len(str(raised.value)) < 1000


def test_a_tensor_of_many_parts_is_named_in_few_words(tmp_path: Path) -> None:
    parts = tuple(Chunk(shard=0, offsets=(number,), shape=(1,)) for number in range(10_000))
    wrong = Entry(dtype="F32", shape=(10_001,), fingerprint="0" * 16, chunks=parts)
    (tmp_path / "index.json").write_text(index(w=wrong).model_dump_json())
    with refused(DataError, "9,997 more"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"optimizer_steps": -1}, {"optimizer_steps": 1.5}, {"optimizer_steps": 10**30}, {"world_size": 0},
        {"step": -2}, {"step": 10**30},
    ],
)  # fmt: skip
def test_counters_that_cannot_be_are_a_data_error(tmp_path: Path, damage: dict[str, Any]) -> None:
    state = {
        "save_id": "a", "step": 2, "world_size": 1, "optimizer_steps": 2, "placement": {}, "versions": {},
        "values": {},
    }  # fmt: skip
    (tmp_path / "state.json").write_text(json.dumps({**state, **damage}))
    with refused(DataError, *damage):
        read_stored(tmp_path / "state.json", StateFile)


def test_all_that_differs_from_the_model_is_listed() -> None:
    stored = index(
        same=entry((2,), ((0,), (2,))),
        shape=entry((2,), ((0,), (2,))),
        dtype=entry((2,), ((0,), (2,))),
        surplus=entry((2,), ((0,), (2,))),
        **{"optimizer.exp_avg.same": entry((2,), ((0,), (2,)))},
    )
    specs = {
        "same": TensorSpec((2,), torch.float32),
        "shape": TensorSpec((3,), torch.float32),
        "dtype": TensorSpec((2,), torch.bfloat16),
        "missing": TensorSpec((2,), torch.float32),
        "empty": TensorSpec((0, 2), torch.float32),  # such as the null rows of a group without null experts
    }
    with pytest.raises(ConfigError) as raised:
        check_fits(Path("step_1"), stored, specs, ignore_prefix="optimizer.")
    lines = str(raised.value).split("\n  - ")
    assert "4 tensors differ" in lines[0]
    assert [line.partition(":")[0] for line in lines[1:]] == ["shape", "dtype", "missing", "surplus"]
    assert "(3,)" in lines[1]
    assert "(2,)" in lines[1]
    with refused(ConfigError):
        check_fits(Path("step_1"), stored, specs)


def test_a_long_list_is_cut() -> None:
    specs = {f"w{i}": TensorSpec((1,), torch.float32) for i in range(100)}
    with refused(ConfigError) as raised:
        check_fits(Path("step_1"), index(), specs)
    assert str(raised.value).count("\n") == 21
