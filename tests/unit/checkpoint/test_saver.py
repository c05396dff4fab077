"""Tests asynchronous saves on one rank. tests/distributed/test_resume.py tests saves on several ranks."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_dist.checkpoint import manager as manager_module
from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.saver import CheckpointWriter
from moe_dist.errors import CheckpointError, MoeDistError
from tests.support.messages import refused
from tests.support.small_run import SmallRun


class LostError(MoeDistError):
    """Stands in for the error that a lost lease raises."""


class HeldWrite:
    """Makes each write of a shard wait until the test releases it, and then succeed or fail."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun, self.go, self.error = threading.Event(), threading.Event(), None
        real: Callable[..., None] = manager_module.write_shard

        def held(*args: Any, **kwargs: Any) -> None:
            self.begun.set()
            assert self.go.wait(600)
            if self.error is not None:
                raise self.error
            real(*args, **kwargs)

        patch.setattr(manager_module, "write_shard", held)

    error: Exception | None


def test_training_steps_during_a_save_do_not_change_the_saved_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = SmallRun(tmp_path / "sync").train(3)
    expected = open_checkpoint(twin.save(3, position=24))
    run = SmallRun(tmp_path / "async").train(3)
    saver = CheckpointWriter(run.manager, asynchronous=True)
    write = HeldWrite(monkeypatch)
    saver.write(3, run.state(position=24), durable=False)
    assert write.begun.wait(600)
    assert torch.equal(run.train(4).weights(), twin.train(4).weights())
    assert saver.in_flight
    assert run.manager.latest() is None
    write.go.set()
    saver.wait()
    assert not saver.in_flight
    found = open_checkpoint(tmp_path / "async" / "step_3")
    assert found.index.tensors == expected.index.tensors  # also compares fingerprints
    assert found.state.model_dump(exclude={"save_id"}) == expected.state.model_dump(exclude={"save_id"})
    ours, theirs = (load_file(contents.folder / "shard_00000.safetensors") for contents in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_save_at_most_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SmallRun(tmp_path).train(1)
    saver = CheckpointWriter(run.manager, asynchronous=True)
    write = HeldWrite(monkeypatch)
    saver.write(1, run.state(), durable=False)
    assert write.begun.wait(600)
    second = threading.Thread(target=lambda: saver.write(2, run.train(1).state(), durable=True))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the second save should wait for the first"
    assert run.names() == ["latest", *(name for name in run.names() if name.startswith("step_1."))]
    write.go.set()
    second.join(600)
    assert run.names() == ["latest", "step_1", "step_2"]


def test_a_failed_write_is_reported_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = SmallRun(tmp_path).train(1)
    saver = CheckpointWriter(run.manager, asynchronous=True)
    saver.write(1, run.state(), durable=True)
    write = HeldWrite(monkeypatch)
    write.error = OSError(5, "Input/output error")
    write.go.set()
    with caplog.at_level(logging.ERROR):
        saver.write(2, run.train(1).state(), durable=False)
        saver.wait()
        saver.poll()
    assert [record.message for record in caplog.records if "Input/output" in record.message], caplog.records
    assert sum("next interval tries again" in record.message for record in caplog.records) == 1
    assert run.names() == ["latest", "step_1"]
    assert (tmp_path / "latest").read_text() == "step_1\n"
    with refused(CheckpointError):
        saver.write(3, run.state(), durable=True)
    write.error = None
    saver.write(3, run.state(), durable=True)
    assert run.names() == ["latest", "step_1", "step_3"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_lost_lease_ends_the_run(tmp_path: Path, asynchronous: bool) -> None:
    def lost() -> None:
        raise LostError("another attempt holds the lease")

    run = SmallRun(tmp_path, lease=lost).train(1)
    saver = CheckpointWriter(run.manager, asynchronous=asynchronous)

    def save() -> None:
        saver.write(1, run.state(), durable=False)
        saver.wait()

    with pytest.raises(LostError):
        save()
    saver.poll()  # the failure is reported only once
