"""Traces are read back as written, also after a kill, a resume or damage. moe_dist/monitor/trace/format.py explains the
shape letters."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from pydantic import ValidationError

from moe_dist.errors import DataError
from moe_dist.monitor.trace.format import ENTRY, TOKEN, Manifest, entry_check
from moe_dist.monitor.trace.reader import read_trace
from moe_dist.monitor.trace.writer import WAITING, TraceWriter
from moe_dist.placement.placement import ExpertGroup
from moe_dist.placement.replica_slots import PlacementWithReplicas, Replica
from tests.support.messages import refused
from tests.support.special_files import reads_little

GROUPS = (ExpertGroup("text", 4, 2, 2, 8, 0, ("text",)), ExpertGroup("image", 2, 1, 1, 8, 4, ("image",)))
MANIFEST = Manifest(1, 0, 2, (1, 3, 5), 2, True, GROUPS, (0, 0, 1, 1, 0, 1), ("text", "image"))
REPLICAS = ((Replica(0, 1), Replica(3, 2)), (), ())  # the second replica is on a rank without experts


class Part(NamedTuple):
    tokens: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    losses: np.ndarray


def part(step: int, rank: int, rows: int = 5) -> Part:
    rng = np.random.default_rng((step, rank))
    tokens = np.zeros(rows, TOKEN)
    tokens["sequence"], tokens["position"], tokens["token"] = 10 * step + rank, np.arange(rows), rng.integers(0, 99, rows)
    return Part(
        tokens,
        rng.integers(-3, MANIFEST.num_columns, (rows, 3, 2)).astype(np.int16),
        rng.random((rows, 3, 2)).astype(np.float16),
        rng.random(rows).astype(np.float16),
    )


def write(folder: Path, manifest: Manifest, steps: range, name: str) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    (place / "manifest.json").write_text(manifest.to_json())
    for rank in range(manifest.ranks):
        writer = TraceWriter(place, rank, weights=manifest.weights, losses=manifest.losses)
        for step in steps:
            writer.add(step, *part(step, rank))
        writer.close()
        writer.close()
    return place


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    manifest = replace(MANIFEST, losses=True, replicas=REPLICAS)
    write(tmp_path / "trace", manifest, range(1, 4), "a")
    trace = read_trace(tmp_path)
    assert trace.steps == (1, 2, 3)
    step = trace.step(2)
    for name in Part._fields:
        assert np.array_equal(getattr(step, name), np.concatenate([getattr(part(2, rank), name) for rank in (0, 1)]))
    assert step.manifest == manifest
    assert step.manifest.placement == PlacementWithReplicas(GROUPS, ((0, 1, 4), (2, 3, 5), ()), REPLICAS)
    choices_LC, dropped_LC = np.zeros((3, 9), np.int64), np.zeros((3, 9), np.int64)
    for _, layer, k in np.ndindex(step.ids.shape):
        column = int(step.ids[_, layer, k])
        if column != -1:
            choices_LC[layer, column if column >= 0 else -2 - column] += 1
        if column < -1:
            dropped_LC[layer, -2 - column] += 1
    assert np.array_equal(step.choices(), choices_LC)
    assert np.array_equal(step.dropped(), dropped_LC)


def test_a_resume_on_more_ranks_keeps_every_step_once(tmp_path: Path) -> None:
    write(tmp_path, MANIFEST, range(1, 6), "b")  # this attempt was killed after step 5; its last checkpoint is step 3
    write(tmp_path, replace(MANIFEST, attempt=2, from_step=3, ranks=3), range(4, 5), "a")
    trace = read_trace(tmp_path)
    assert trace.steps == (1, 2, 3, 4)
    assert [trace.step(step).manifest.attempt for step in trace.steps] == [1, 1, 1, 2]
    assert len(trace.step(4).tokens) == 15


WRITER = """
import sys
from pathlib import Path
from moe_dist.monitor.trace.writer import TraceWriter
from tests.unit.monitor.trace.test_files import MANIFEST, part
place = Path(sys.argv[1])
(place / "manifest.json").write_text(MANIFEST.to_json())
writers = [TraceWriter(place, rank, weights=True) for rank in (0, 1)]
for step in range(1, 100000):
    for rank, writer in enumerate(writers):
        writer.add(step, *part(step, rank, 7))
    if step == 20:
        print("going", flush=True)
"""


def test_a_killed_writer_leaves_a_readable_trace(tmp_path: Path) -> None:
    place = tmp_path / "a"
    place.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(place)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[4]
    ) as process:
        assert process.stdout.readline() == "going\n"
        process.send_signal(signal.SIGKILL)
    trace = read_trace(tmp_path)
    assert len(trace.steps) >= 14, "at most the steps that were waiting are lost"
    assert trace.steps == tuple(range(1, trace.steps[-1] + 1))
    for step in (1, trace.steps[-1]):
        assert np.array_equal(trace.step(step).ids[7:], part(step, 1, 7).ids)


@pytest.mark.parametrize("cut", [1, ENTRY.itemsize - 1])
def test_an_incomplete_index_entry_does_not_count(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, MANIFEST, range(1, 4), "a") / "rank_1.index"
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_trace(tmp_path).steps == (1, 2), "a step of which a rank is missing is left out"


@pytest.mark.parametrize(
    ("file", "damage", "key"),
    [
        ("rank_1.ids", lambda content: content[:-1], "rank_1.ids"),
        ("rank_0.weights", lambda content: content[:-1] + bytes([content[-1] ^ 1]), "rank_0"),
        ("manifest.json", lambda _: replace(MANIFEST, groups=GROUPS[:1]).to_json().encode(), "groups"),
        ("manifest.json", lambda _: b'{"format": "moe_dist trace", "version": 9}', "manifest.json"),
        ("manifest.json", lambda _: b'{"format": 1, "version": 1}', "manifest.json"),
        ("manifest.json", lambda _: b"{}", "manifest.json"),
        ("manifest.json", lambda _: b"[", "manifest.json"),
        *((name, None, name) for name in ("manifest.json", "rank_0.index", "rank_0.ids")),
    ],
    ids=["cut off", "changed", "another model", "version", "format", "no field", "no JSON", *["a FIFO"] * 3],
)
def test_damage_is_named(tmp_path: Path, file: str, damage: Callable[[bytes], bytes] | None, key: str) -> None:
    path = write(tmp_path, MANIFEST, range(1, 4), "a") / file
    content = path.read_bytes()
    path.unlink()
    if damage is None:
        os.mkfifo(path)
    else:
        path.write_bytes(damage(content))
    if file == "rank_1.ids":
        assert len(read_trace(tmp_path).step(2).ids) == 10, "the steps before are whole"
    with refused(DataError, key):
        read_trace(tmp_path).step(3)


HOSTILE: dict[str, dict[str, Any]] = {
    **{f"ranks {value!r:.9}": {"ranks": value} for value in (10**9, "x", 0)},
    **{f"layers {value!r:.9}": {"layers": value} for value in (5, ["\x1b[31m"], [10**9])},
    "choices": {"choices": 10**12},
    "experts' ranks": {"rank_of_expert": [10**9] * 6},
    "replicas": {"replicas": [[[0, 10**9]], [], []]},
    "unknown field": {"more": 1},
    **{
        f"group {key}": {"groups": [{**asdict(GROUPS[0]), key: value}, asdict(GROUPS[1])]}
        for key, value in (("name", "\x1b]0;pwn\x07"), ("num_experts", 10**9), ("ffn_dim", -5))
    },
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_refused(tmp_path: Path, case: str) -> None:
    path = write(tmp_path, MANIFEST, range(1, 2), "a") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | HOSTILE[case]))
    with reads_little(), refused(DataError, "manifest.json", golden=False) as error:
        read_trace(tmp_path)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("key", ["layers", "groups", "rank_of_expert", "modalities", "replicas"])
def test_only_the_first_fault_of_a_list_is_collected(key: str) -> None:
    with pytest.raises(ValidationError) as error:
        Manifest.from_json(json.loads(MANIFEST.to_json()) | {key: [None] * 9})
    assert error.value.error_count() < 3  # pydantic may add that the list is too short


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"format":[' + b"[]," * (1 << 18) + b"[]]}"], ids=["deep", "long"])
def test_a_bomb_of_lists_is_refused(tmp_path: Path, content: bytes) -> None:
    (write(tmp_path, MANIFEST, range(1, 2), "a") / "manifest.json").write_bytes(content)
    with reads_little(), refused(DataError, "manifest.json", golden=False):
        read_trace(tmp_path)


@pytest.mark.parametrize(("first", "rows"), [(0, 10**13), (10**18, 4), (0, -4), (-4, 4), (0, 10**8)])
def test_an_index_entry_outside_its_files_is_refused(tmp_path: Path, first: int, rows: int) -> None:
    place = write(tmp_path, MANIFEST, range(1, 2), "a")
    entry = np.array([(1, first, rows, 0, 0)], ENTRY)
    entry["check"] = entry_check(entry)
    entry.tofile(place / "rank_0.index")
    os.truncate(place / "rank_0.tokens", 2 << 30)  # a sparse file, without blocks on the disk
    with reads_little(), refused(DataError, "rank_0.tokens", golden=False):
        read_trace(tmp_path).step(1)


def test_no_trace_and_a_step_without_trace(tmp_path: Path) -> None:
    with refused(DataError):
        read_trace(tmp_path)
    write(tmp_path, MANIFEST, range(1, 3), "a")
    with refused(DataError):
        read_trace(tmp_path).step(7)


@pytest.mark.parametrize(("spoil", "words"), [("disk", "No space left"), ("file", "write to closed file")])
def test_an_error_ends_the_trace_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: str, words: str
) -> None:
    writer = TraceWriter(tmp_path, 0, weights=True)
    writer._files["ids"].close()
    if spoil == "disk":
        writer._files["ids"] = Path("/dev/full").open("wb")  # noqa: SIM115
    for step in range(1, 9):
        writer.add(step, *part(step, 0))
    writer.flush()
    writer.close()
    assert len([record for record in caplog.records if words in record.message and "rank_0" in record.message]) == 1
    assert all(file.closed for file in writer._files.values())
    assert not (tmp_path / "rank_0.index").stat().st_size


def test_closing_does_not_wait_for_a_disk_that_hangs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_dist.monitor.trace.writer.CLOSE_SECONDS", 0.2)
    writer, answers = TraceWriter(tmp_path, 0, weights=True), threading.Event()
    monkeypatch.setattr(writer, "_write", lambda *_: answers.wait())
    for step in range(1, WAITING + 2):  # WAITING steps wait, and one is being written
        writer.add(step, *part(step, 0))
    writer.close()
    assert "not written within 0.2 s" in caplog.text
    answers.set()
    monkeypatch.setattr("moe_dist.monitor.trace.writer.CLOSE_SECONDS", 30.0)
    writer.close()
    assert all(file.closed for file in writer._files.values())
