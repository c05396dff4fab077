import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from moe_dist.checkpoint import manager as manager_module
from moe_dist.checkpoint.state import RankLayout, capture
from moe_dist.checkpoint.storage import take_snapshot
from moe_dist.checkpoint.verify import verify
from moe_dist.errors import CheckpointError, ConfigError, DataError, DivergedError, MoeDistError
from moe_dist.optim.optimizer import step_count
from tests.support.messages import refused
from tests.support.small_run import PLACEMENT, SmallRun


class LostError(MoeDistError):
    """Stands in for the error that a lost lease raises."""


def test_a_run_goes_on_where_it_was_bit_for_bit(tmp_path: Path) -> None:
    undisturbed = SmallRun(tmp_path / "a").train(7)
    first = SmallRun(tmp_path / "b").train(4)
    assert first.manager.latest() is None
    folder = first.save(4, position=32, config={"lr": 0.1, "none": None})
    assert first.manager.latest() == folder == tmp_path / "b" / "step_4"
    resumed = SmallRun(tmp_path / "b").train(1)  # the weights then differ from the checkpoint's
    restored = resumed.manager.load(folder, resumed.state())
    assert (restored.step, restored.values) == (4, {"position": 32, "config": {"lr": 0.1, "none": None}})
    assert restored.rank_values == {"rng": "00"}
    assert step_count(resumed.optimizer) == 4
    assert torch.equal(resumed.train(3).weights(), undisturbed.weights())


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, keep=2)
    for step in (2, 9, 10, 11):
        run.save(step)
    assert run.names() == ["latest", "step_10", "step_11"]


def test_a_run_that_went_back_keeps_what_it_saves_and_what_lies_ahead(tmp_path: Path) -> None:
    """After a divergence a run goes back to step 2 and saves step 5, with keep=1. It deletes step 2, but not the later
    step 9."""
    run = SmallRun(tmp_path, keep=2)
    run.save(2)
    run.save(9)
    back = SmallRun(tmp_path, keep=1)
    back.save(5)
    assert back.names() == ["latest", "step_5", "step_9"]
    assert back.manager.latest() == tmp_path / "step_5"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["weight", "moment"])
def test_no_save_has_a_value_that_is_not_finite(tmp_path: Path, place: str, value: float) -> None:
    run = SmallRun(tmp_path, keep=1).train(1)
    first = run.save(1)
    weight = run.train(1).model[0].weight
    tensor = weight.data if place == "weight" else run.optimizer.state[weight]["exp_avg_sq"]  # pyright: ignore
    tensor[3, 1] = value
    with pytest.raises(
        DivergedError, match=r"1 of 12 tensors contain nan or inf, the first is (optimizer.exp_avg_sq.)?0.weight"
    ):
        run.save(2)
    assert run.names() == ["latest", "step_1"]
    assert verify(first)[1] == []
    tensor[3, 1] = 1e38  # finite, although its square and its sums overflow
    assert run.save(3) == run.manager.newest
    assert run.names() == ["latest", "step_3"]


def test_the_committed_step_is_not_written_again(tmp_path: Path) -> None:
    run = SmallRun(tmp_path).train(1)
    index = run.save(1) / "index.json"
    before = index.read_bytes()
    run.save(1)
    assert index.read_bytes() == before


@pytest.mark.parametrize("moment", ["commit", "pointer"])
def test_a_crash_before_the_pointer_moves_leaves_latest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run = SmallRun(tmp_path).train(1)
    first = run.save(1)
    weights = run.weights()
    run.train(1)
    real = Path.rename

    def crash(self: Path, target: Path) -> Path:
        if (self.name.startswith("latest")) == (moment == "pointer"):
            raise KeyboardInterrupt  # the code does not handle this exception
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process does not clean up
        with pytest.raises(KeyboardInterrupt):
            run.save(2)
    assert len(run.names()) > 2, "the crash should have left something behind"
    resumed = SmallRun(tmp_path)
    assert resumed.manager.latest() == first
    resumed.manager.load(first, resumed.state())
    assert torch.equal(resumed.weights(), weights)
    resumed.train(1).save(2)
    assert resumed.names() == ["latest", "step_1", "step_2"]
    other = SmallRun(tmp_path)
    other.manager.load(tmp_path / "step_2", other.state())
    assert torch.equal(other.weights(), resumed.weights())


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_lost_lease_never_moves_latest(tmp_path: Path, calls: int) -> None:
    left = [100]

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise LostError("another attempt holds the lease")

    run = SmallRun(tmp_path, lease=check).train(1)
    first = run.save(1)
    left[0] = calls
    with pytest.raises(LostError):
        run.save(2)
    assert left[0] == -1
    assert run.manager.latest() == first
    assert not [name for name in run.names() if name.endswith(".tmp")]


def test_everything_is_durable_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    real_sync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        name = re.sub(r"\.[0-9a-f]+(?=\.tmp)", "", Path(f"/proc/self/fd/{descriptor}").readlink().name)
        events.append(("sync", name))
        real_sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append(("rename", target.name))
        return real_rename(self, target)

    run = SmallRun(tmp_path / "checkpoints")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    run.save(1)
    assert events == [
        ("sync", "latest.tmp"),  # names no checkpoint yet; so a missing `latest` was removed by somebody
        ("rename", "latest"),
        ("sync", "checkpoints"),
        ("sync", "shard_00000.safetensors"),
        ("sync", "index.json"),
        ("sync", "state.json"),
        ("sync", "SHA256SUMS"),
        ("sync", "step_1.tmp"),
        ("rename", "step_1"),
        ("sync", "checkpoints"),
        ("sync", "latest.tmp"),
        ("rename", "latest"),
        ("sync", "checkpoints"),
    ]


def test_a_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SmallRun(tmp_path).train(1)
    needed = take_snapshot(1, run.state()).nbytes
    assert needed == 3 * 4 * (4 * 8 + 8 + 8 + 1)
    monkeypatch.setattr(manager_module, "SLACK", 0)
    for free, enough in ((needed - 1, False), (needed + needed // 100, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free))  # type: ignore[attr-defined]
        if enough:
            run.save(1)
        else:
            with pytest.raises(CheckpointError, match=f"{free:,} are free"):
                run.save(1)
            assert run.names() == []


def test_leftovers_of_a_crash_make_room_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = tmp_path / "step_9.0123456789ab.tmp"
    leftover.mkdir()
    (leftover / "shard_00000.safetensors").write_bytes(b"half")
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda _: shutil._ntuple_diskusage(0, 0, 0 if leftover.exists() else free),  # type: ignore[attr-defined]
    )
    SmallRun(tmp_path).save(1)


def test_parameters_load_without_their_optimizer(tmp_path: Path) -> None:
    run = SmallRun(tmp_path).train(2)
    folder = run.save(2)
    other = SmallRun(tmp_path).train(1)
    other.manager.load(folder, capture(other.model, None, RankLayout(PLACEMENT)))
    assert torch.equal(other.weights(), run.weights())
    assert step_count(other.optimizer) == 1
    bare = SmallRun(tmp_path / "bare").train(1)
    without = bare.manager.save(1, capture(bare.model, None, RankLayout(PLACEMENT)))
    with refused(ConfigError, "optimizer.exp_avg.0.weight"):
        bare.manager.load(without, bare.state())


@pytest.mark.parametrize("content", [b"step_7\n", b"../step_1", b"/etc", b"", b"\xff\xfe", b"step_1/../step_1"])
def test_a_latest_that_names_no_checkpoint_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    run = SmallRun(tmp_path)
    run.save(1)
    (tmp_path / "latest").write_bytes(content)
    with refused(DataError):
        run.manager.latest()
    assert run.save(1) == run.manager.latest()


def test_a_checkpoint_in_a_folder_of_another_step_is_refused_and_replaced(tmp_path: Path) -> None:
    run = SmallRun(tmp_path).train(2)
    run.save(2).rename(tmp_path / "step_4")
    (tmp_path / "latest").write_text("step_4\n")
    with refused(DataError):
        run.manager.load(tmp_path / "step_4", run.state())
    folder = run.train(2).save(4)
    other = SmallRun(tmp_path)
    assert other.manager.load(folder, other.state()).step == 4
    assert torch.equal(other.weights(), run.weights())


def test_a_deleted_latest_does_not_start_a_new_run(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    assert run.manager.latest() is None
    run.train(1).save(1)
    run.train(1).save(2)
    (tmp_path / "latest").unlink()
    with refused(DataError):
        run.manager.latest()
    (tmp_path / "latest").write_text("step_1")  # without a newline
    assert run.manager.latest() == tmp_path / "step_1"


def test_a_crash_in_the_first_commit_is_a_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, real = SmallRun(tmp_path).train(1), Path.rename

    def crash(self: Path, target: Path) -> Path:
        if target.name == "latest" and (tmp_path / "step_1").exists():
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            run.save(1)
    assert "step_1" in run.names()
    assert run.manager.latest() is None
    run.save(1)
    assert run.manager.latest() == tmp_path / "step_1"


def test_damage_names_the_older_checkpoints(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, keep=3)
    for step in (1, 2, 3):
        run.train(1).save(step)
    shard = tmp_path / "step_3" / "shard_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 4
    shard.write_bytes(content)
    with refused(DataError, "shard_00000.safetensors"):
        run.manager.load(tmp_path / "step_3", run.state())


def test_weights_of_no_checkpoint_or_of_no_equal_tensor_are_refused(tmp_path: Path) -> None:
    SmallRun(tmp_path / "a").train(3).save(3)
    run = SmallRun(tmp_path / "b")
    with refused(ConfigError):
        run.manager.load_fitting(tmp_path / "nowhere", run.state())
    run.model = torch.nn.Sequential(torch.nn.Linear(3, 2))  # type: ignore[assignment]
    with refused(ConfigError):
        run.manager.load_fitting(tmp_path / "a", capture(run.model, None, RankLayout(PLACEMENT)))
