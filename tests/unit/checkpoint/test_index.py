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
    index_problems,
    read_index,
    read_stored,
)
from moe_dist.checkpoint.state import TensorSpec
from moe_dist.errors import ConfigError, DataError
from tests.support.messages import refused


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
        entry((4, 6), ((0, 0), (4, 6)), ((0, 0), (4, 6))),  # twice
        entry((4, 6), ((0, 0), (5, 6))),  # too long
        entry((4, 6), ((0, 1), (4, 6))),  # shifted
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


@pytest.mark.parametrize(
    "damage",
    [
        {"optimizer_steps": -1},
        {"optimizer_steps": 1.5},
        {"optimizer_steps": 10**30},
        {"world_size": 0},
        {"step": -2},
        {"step": 10**30},
    ],
)
def test_counters_that_cannot_be_are_a_data_error(tmp_path: Path, damage: dict[str, Any]) -> None:
    state = {
        "save_id": "a",
        "step": 2,
        "world_size": 1,
        "optimizer_steps": 2,
        "placement": {},
        "versions": {},
        "values": {},
    }
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
        "empty": TensorSpec((0, 2), torch.float32),  # null rows of a group without null experts
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
