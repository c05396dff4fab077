"""Files from elsewhere that once ended a command in a traceback or a native crash, or took minutes or gigabytes."""

import io
import struct
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launchers.run_progress import RunProgress, RunState
from launchers.status import duration
from moe_dist.checkpoint.index import LONGEST_NAME, Index, index_problems
from moe_dist.config.load import load_config
from moe_dist.data.codebook import load_codebook
from moe_dist.data.pictures import rasterise
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.numpy_file import load_array
from moe_dist.inference.loaded_run import find_trained
from moe_dist.monitor.sinks.tensorboard import drop_events_after
from moe_dist.monitor.trace.foreign import read_foreign
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.runtime.cause import line_of_cause
from moe_dist.runtime.files import lines_from_end
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.train.start.resume import Progress
from tests.support.one_rank import OneRank, world_of_one
from tests.support.tiny import tiny_config, write_config


def array_file(header: str) -> bytes:
    """Returns a .npy file of 128 bytes with this header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64)


def of_shape(shape: str, kind: str = "|u1") -> bytes:
    return array_file(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n")


def test_a_step_of_1e308_seconds_has_no_time_left() -> None:
    progress: Any = SimpleNamespace(state=RunState.RUNNING, total_steps=100, step=1, step_seconds=1e308)
    assert duration(RunProgress.remaining_seconds.fget(progress)) == ""  # pyright: ignore[reportOptionalCall]


@pytest.mark.parametrize("reason", ["up to step " + "9" * 5000, "collective " * 40_000, "the copies of " * 40_000])
def test_a_long_reason_is_judged_by_its_beginning(reason: str) -> None:
    begun = time.process_time()
    record: Any = SimpleNamespace(verdict=1, reason=reason, rank=0, rank_host="", last_step=3)
    assert line_of_cause(record, (), 2).startswith("cause: ")
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("content", [of_shape("(-1,)", "|V0"), array_file("(" * 5000), of_shape("(10,)", "|V0")])
def test_a_damaged_header_of_an_array_is_refused(tmp_path: Path, content: bytes) -> None:
    """numpy divides by the size of an element, which ends the process."""
    (tmp_path / "a.npy").write_bytes(content)
    for most in (None, 1 << 20):
        with pytest.raises(ValueError, match="its header is damaged"):
            load_array(tmp_path / "a.npy", most_bytes=most)


@pytest.mark.parametrize("shape", ["(0, 100000000, 1)", "(100000000, 0, 1)", "(0, 0, 0)"])
def test_an_empty_array_of_a_huge_shape_is_no_trace(tmp_path: Path, shape: str) -> None:
    (tmp_path / "a.npy").write_bytes(of_shape(shape, "<i8"))
    with pytest.raises(DataError, match="at least one of each"):
        read_foreign(tmp_path / "a.npy", 8)


def test_a_codebook_without_codes_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "codebook.npy", np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match=r"uint8 \[0, 4, 4, 3\]"):
        load_codebook(tmp_path / "codebook.npy")


def test_a_picture_with_a_wrong_palette_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("P", (4, 4)).save(stream, "PNG")
    whole, alpha = stream.getvalue(), b"tRNS" + bytes(300)
    at = whole.index(b"IDAT") - 4
    chunk = struct.pack(">I", 300) + alpha + struct.pack(">I", zlib.crc32(alpha))
    (tmp_path / "a.png").write_bytes(whole[:at] + chunk + whole[at:])
    with pytest.raises(DataError, match=r"a\.png': not a PNG"):
        rasterise(tmp_path / "a.png")


def test_a_placement_of_more_experts_than_memory_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"without one: .*'text/2', 'text/3'"):
        ExpertPlacement((ExpertGroup("text", 10**30, 0, 1, 8),), ((0,), (1,)))


def test_a_tensor_with_a_long_name_is_damage() -> None:
    entry = {"dtype": "F32", "shape": [0], "fingerprint": "0" * 16, "chunks": []}
    index = Index(save_id="a", step=1, shards=(), tensors={"layers.1." * 30_000: entry})  # pyright: ignore
    assert index_problems(index) == [f"{'layers.1.' * 111}l...: a name has at most {LONGEST_NAME:,} characters"]


def test_a_weight_of_1e308_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    path = write_config(tiny_config(tiny_data, tmp_path), tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"data\.weights\.a"):
        load_config(path, ["data.weights.a=1e308"])


def test_a_configuration_larger_than_its_checkpoint_takes_no_memory(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world_of_one():
        one = OneRank(tiny_data, tmp_path)
        one.resumable.save(Progress(step=1), durable=True)
    folder = next(tmp_path.rglob("state.json")).parent
    larger = tiny_config(tiny_data, tmp_path, {"model.hidden_dim": 1_000_000, "parallel.ep": 1})
    monkeypatch.setattr("moe_dist.inference.loaded_run.saved_config", lambda *_: larger)
    with pytest.raises(DataError, match=r"describes [\d,]+ parameters, but the tensors have [\d,]+; restore state\.json"):
        find_trained(folder)


@pytest.mark.parametrize("damage", [b"\xff" * 20, None])
def test_events_after_a_damaged_one_are_left_out(tmp_path: Path, damage: bytes | None) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    path = tmp_path / "events.out.tfevents.1.host.1.0"
    with path.open("wb") as stream:
        if damage:
            RecordWriter(stream).write(damage)
        else:
            stream.write(struct.pack("<QI", 1 << 63, 0) + bytes(100))
    drop_events_after(tmp_path, 3)
    assert path.read_bytes() == b""


def test_a_step_of_5000_digits_is_no_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step":' + "9" * 5000 + ',"kind":"step"}\n')
    assert RunFolder(tmp_path).last_step() == 0


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_long_line_is_read_in_linear_time(tmp_path: Path, end: str) -> None:
    """60 MB took 37 s of CPU time when each block of 64 KB was joined to all that follow it."""
    (tmp_path / "a").write_text("first\n" + "x" * 60_000_000 + end)
    begun = time.process_time()
    assert [len(line) for line in lines_from_end(tmp_path / "a", most_bytes=1 << 30)] == [60_000_000] * bool(end) + [5]
    assert time.process_time() - begun < 10
