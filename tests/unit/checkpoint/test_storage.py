import os
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader

from moe_dist.checkpoint.contents import Contents, open_shard
from moe_dist.checkpoint.index import Cut, Index, StateFile
from moe_dist.checkpoint.state import TensorSpec
from moe_dist.checkpoint.storage import Piece, build_index, pieces_of, read_tensors, write_shard, write_tensors
from moe_dist.errors import DataError

TENSORS = {
    "bf16": torch.tensor([1.0, -2.5, 3e38]).bfloat16(),
    "double": torch.tensor([[1e-300, 2.0], [float("inf"), -0.0]], dtype=torch.float64),
    "long": torch.tensor([2**62, -1]),
    "scalar": torch.tensor(3.5),
    "view": torch.arange(24.0).view(2, 3, 4)[1],
    "strided": torch.arange(6.0).view(2, 3).T,
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
}


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def written(folder: Path, save_id: str = "a1", *, sign: int = 1) -> Contents:
    """Writes two shards. The first shard has all of TENSORS. The second shard has only `other`, multiplied by `sign`."""
    folder.mkdir(exist_ok=True)
    write_shard(folder, 0, pieces_of(TENSORS), save_id=save_id, step=1, rank_values={"rng": [1, "x"]})
    write_shard(folder, 1, pieces_of({"other": sign * torch.ones(3)}), save_id=save_id, step=1, rank_values={})
    specs = specs_of(TENSORS) | {"other": TensorSpec((3,), torch.float32)}
    return contents_of(folder, build_index(folder, specs, step=1, save_id=save_id, num_shards=2))


def contents_of(folder: Path, index: Index) -> Contents:
    state = StateFile(
        save_id=index.save_id, step=1, world_size=2, optimizer_steps=None, placement={}, versions={}, values={}
    )
    return Contents(folder, index, state)


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()} | {"other": torch.zeros(3)}


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    contents = written(tmp_path)
    tensors = blank()
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    read_tensors(contents, tensors)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].data_ptr() == places[name]
    assert tensors["double"][1, 1].signbit()
    assert tensors["other"].eq(1).all()
    assert open_shard(contents, 0).rank_values == {"rng": [1, "x"]}


def test_a_part_takes_its_rows_from_every_shard_that_has_some(tmp_path: Path) -> None:
    """Reads rows and columns of a tensor [10, 3] that is stored in shards of 4, 5 and 1 rows."""
    whole, places = torch.arange(30).view(10, 3), [(0, 4), (4, 9), (9, 10)]
    for number, (first, end) in enumerate(places):
        piece = {"x": Piece(whole[first:end], (first, 0), (10, 3))}
        write_shard(tmp_path, number, piece, save_id="a1", step=1, rank_values={})
    contents = contents_of(tmp_path, build_index(tmp_path, specs_of({"x": whole}), step=1, save_id="a1", num_shards=3))
    for dim, start, length in ((0, 0, 10), (0, 3, 4), (0, 4, 5), (0, 8, 2), (1, 1, 2)):
        part = torch.full_like(whole.narrow(dim, start, length), -1)
        read_tensors(contents, {"part": part}, {"part": Cut("x", dim, start)})
        assert torch.equal(part, whole.narrow(dim, start, length))


def test_a_part_at_another_place_than_the_index_lists_is_refused(tmp_path: Path) -> None:
    """Two shards hold one half of a tensor each, but the index lists both halves in the same shard."""
    for number, first in enumerate((2, 0)):
        piece = {"x": Piece(torch.full((2, 3), float(first)), (first, 0), (4, 3))}
        write_shard(tmp_path, number, piece, save_id="a1", step=1, rank_values={})
    tensors = {"x": torch.zeros(4, 3)}
    contents = contents_of(tmp_path, build_index(tmp_path, specs_of(tensors), step=1, save_id="a1", num_shards=2))
    one, other = contents.index.tensors["x"].chunks
    together = one, other.model_copy(update={"shard": one.shard})
    contents.index.tensors["x"] = contents.index.tensors["x"].model_copy(update={"chunks": together})
    with pytest.raises(DataError, match="x is not the part that the index lists"):
        read_tensors(contents, tensors)


def test_torchs_own_reader_understands_the_files(tmp_path: Path) -> None:
    written(tmp_path)
    metadata = HuggingFaceStorageReader(str(tmp_path)).read_metadata()
    assert set(metadata.state_dict_metadata) == {*TENSORS, "other"}
    assert metadata.state_dict_metadata["double"].size == torch.Size([2, 2])  # type: ignore[union-attr]


def test_the_umask_says_who_may_read_a_shard(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "weights.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o640
