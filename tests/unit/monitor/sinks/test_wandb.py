"""The real wandb in offline mode writes a file that the test reads back, and tries no connection."""

import json
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import ConfigError
from moe_dist.monitor.sinks.sink import SinkContext
from moe_dist.monitor.sinks.trackers import WandbSink
from tests.support.messages import refused
from tests.unit.monitor.conftest import MakeRecord, send

BLOCK = 32768


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Returns the attempted connections. Listeners of this test stand in for every proxy and for wandb's server."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[Any] = []

    def accept() -> None:
        while True:
            try:
                connection, peer = listener.accept()
            except OSError:
                return
            connections.append(peer)
            connection.close()

    thread = threading.Thread(target=accept)
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, address)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for name in ("NO_PROXY", "no_proxy", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield connections
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def records_of(folder: Path) -> list[Any]:
    """Reads wandb's file: a header of seven bytes, then blocks in LevelDB's log format, of pieces [crc 4, length 2, type 1,
    data]."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, piece, records = 7, b"", []
    while at < len(content):
        left_in_block = BLOCK - at % BLOCK
        if left_in_block < 7:
            at += left_in_block
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        piece += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            records.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    return records


def test_offline_writes_files_and_never_connects(tmp_path: Path, make_record: MakeRecord, tried: list[Any]) -> None:
    import wandb  # 0.7 s, which each worker would need to collect this file

    send(WandbSink(SinkContext(tmp_path, run_name="demo", resume_step=4), project="moe", mode="offline"), make_record)
    wandb.teardown()  # as a process does at its end; after finish() wandb's service process may still write
    assert tried == []
    records = records_of(tmp_path)
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.run_group, run.display_name) == ("moe", "demo", "demo from step 4")
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["_step"] for row in rows] == [5, 6]
    for row in rows:
        expected = {tag: value for tag, value in make_record(row["_step"]).scalars.items() if value is not None}
        assert {tag: row[tag] for tag in expected} == expected
    assert rows[1]["eval/text"] == 3.0
    configs = [json.loads(u.value_json) for r in records for u in r.config.update if u.key == "placement"]
    assert configs == ["| rank | text |"]


def test_without_the_package_the_message_has_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with refused(ConfigError):
        WandbSink(SinkContext(tmp_path, run_name="demo"), project="moe", mode="offline")


def test_going_online_without_a_key_says_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with refused(ConfigError):
        WandbSink(SinkContext(tmp_path, run_name="r"), project="p", mode="online")
