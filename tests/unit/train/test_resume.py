"""Tests the saved state of a run on one rank, and which states are refused. tests/distributed/test_resume.py tests several
ranks and layouts."""

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import JsonValue

from moe_dist.checkpoint import storage
from moe_dist.checkpoint.generators import generator_states, restore_generators
from moe_dist.checkpoint.manager import Restored
from moe_dist.errors import ConfigError, DataError, DivergedError
from moe_dist.optim.optimizer import step_count
from moe_dist.train.loop.trainer import Progress
from moe_dist.train.start.resume import check_skip, progress_of
from tests.support.messages import refused
from tests.support.one_rank import OneRank, world_of_one
from tests.support.tiny import tiny_config, tiny_dataset

GOOD = {"step": 4, "position": 32, "tokens": 1000, "skipped_steps": 2, "skipped_in_a_row": 1, "evaluated": 4}


def found(progress: Any, tmp_path: Path, *, step: int = 4) -> Progress:
    restored = Restored(step, {"progress": progress}, {})
    return progress_of(restored, tiny_config(tmp_path, tmp_path), Path("step_4"))


@pytest.mark.parametrize(
    "change",
    [
        {"step": 3}, {"position": 31}, {"position": 33}, {"tokens": 32 * 64 + 1}, {"tokens": -1}, {"tokens": True},
        {"tokens": 1.0}, {"tokens": "1"}, {"tokens": None}, {"tokens": 1 << 70}, {"skipped_steps": 5},
        {"skipped_in_a_row": 3}, {"evaluated": 5}, {"surplus": 0}, {"tokens": [[]] * 1000},
        {"step": 1 << 28, "position": 8 << 28, "evaluated": 0},
    ],
    ids=lambda change: str(change)[:60],
)  # fmt: skip
def test_counters_that_contradict_each_other_are_a_data_error(tmp_path: Path, change: dict[str, Any]) -> None:
    with refused(DataError):
        found({**GOOD, **change}, tmp_path, step=change.get("step", 4) if len(change) > 1 else 4)


@pytest.mark.parametrize("steps", [1, 3, 4, 0])
def test_the_optimizer_has_taken_the_steps_that_were_not_skipped(tmp_path: Path, steps: int) -> None:
    restored = Restored(4, {"progress": GOOD}, {}, steps)
    with refused(DataError):
        progress_of(restored, tiny_config(tmp_path, tmp_path), Path("step_4"))
    assert progress_of(replace(restored, optimizer_steps=2), tiny_config(tmp_path, tmp_path), Path("step_4")) == (
        Progress(**GOOD)
    )


@pytest.mark.parametrize("progress", [None, [], 3, {}, {"step": 4}], ids=str)
def test_no_counters_are_a_data_error(tmp_path: Path, progress: Any) -> None:
    with pytest.raises(DataError):
        found(progress, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"torch": "00"}, {"torch": "zz"}, {"torch": 5}, {"python": [3, [1], None]}, {"python": None},
        {"numpy": ["MT", [], 1]},
    ],
    ids=str,
)  # fmt: skip
def test_states_that_are_none_are_a_data_error(change: dict[str, Any]) -> None:
    cpu = torch.device("cpu")
    before = generator_states(cpu)
    with refused(DataError):
        restore_generators({**before, **change}, cpu)  # type: ignore[arg-type]
    restore_generators(before, cpu)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    with world_of_one():
        yield


def drawn() -> tuple[Any, ...]:
    return torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist()


@pytest.mark.usefixtures("one_rank")
def test_a_run_goes_on_with_its_tensors_counters_and_draws(tiny_data: Path, tmp_path: Path) -> None:
    first = OneRank(tiny_data, tmp_path)
    progress = first.train_and_save()
    next_draws = drawn()
    resumed = OneRank(tiny_data, tmp_path)
    assert not torch.equal(resumed.weights(), first.weights())
    assert resumed.resumable.restore() == progress
    assert drawn() == next_draws
    assert torch.equal(resumed.weights(), first.weights())
    assert torch.equal(resumed.moments(), first.moments())
    assert step_count(resumed.training.optimizer) == 2


@pytest.mark.usefixtures("one_rank")
def test_what_an_earlier_writer_left_is_gone_before_anything_is_loaded(tiny_data: Path, tmp_path: Path) -> None:
    first = OneRank(tiny_data, tmp_path)
    first.train_and_save()
    (first.folder / "step_4.0123456789ab.tmp").mkdir()
    (first.folder / "latest.0123456789ab.tmp").write_text("step_4\n")
    OneRank(tiny_data, tmp_path).resumable.restore()
    assert sorted(path.name for path in first.folder.iterdir()) == ["latest", "step_2"]


@pytest.mark.usefixtures("one_rank")
def test_the_checkpoint_of_another_run_is_refused_with_what_differs(tiny_data: Path, tmp_path: Path) -> None:
    a = OneRank(tiny_data, tmp_path, run__name="a")
    a.train_and_save()
    b = OneRank(tiny_data, tmp_path, run__name="b", run__seed=7, optimizer__eps=1e-6)
    shutil.copytree(a.folder, b.folder)
    with pytest.raises(DataError) as raised:
        b.resumable.restore()
    text = str(raised.value)
    assert raised.value.exit_code == 65
    assert "another run saved this checkpoint" in text
    assert "run.seed: 0 in the checkpoint, 7 now" in text
    assert "optimizer.eps: 1e-08 in the checkpoint, 1e-06 now" in text
    assert f"run.init_from={b.folder / 'step_2'}" in text
    assert "run.name" not in text


@pytest.mark.usefixtures("one_rank")
def test_what_may_change_on_resume_does_not_make_it_another_run(tiny_data: Path, tmp_path: Path) -> None:
    a = OneRank(tiny_data, tmp_path / "here", run__name="a")
    progress = a.train_and_save()
    changes = {"train__steps": 90, "checkpoint__every": 7, "optimizer__lr": 1e-4, "data__skip": [[16, 20]]}
    b = OneRank(tiny_data, tmp_path / "there", run__name="b", **changes)
    shutil.copytree(a.folder, b.folder)
    assert b.resumable.restore() == progress


@pytest.mark.parametrize(
    ("first", "second"), [((), ((15, 20),)), (((3, 4),), ()), (((3, 20),), ((3, 12), (14, 14)))], ids=str
)
def test_sequences_that_a_run_has_drawn_stay_as_they_were(first: Any, second: Any, tmp_path: Path) -> None:
    before, now = (tiny_config(tmp_path, tmp_path, {"data.skip": skip}) for skip in (first, second))
    check_skip(Progress(position=16), before, before, Path("step_2"))
    with refused(ConfigError):
        check_skip(Progress(position=16), before, now, Path("step_2"))
    with refused(ConfigError):
        check_skip(Progress(position=16), now, before, Path("step_2"))
    check_skip(Progress(position=0), before, now, Path("step_0"))


@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_of_a_diverged_run_is_refused_with_the_way_back(tiny_data: Path, tmp_path: Path) -> None:
    """Earlier versions saved such checkpoints."""
    run = OneRank(tiny_data, tmp_path)
    run.train_and_save()
    shutil.copytree(run.folder / "step_2", run.folder / "step_1")
    poisoned = next(run.training.parallel.model.parameters())
    poisoned.data[0, 0] = float("nan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "check_finite", lambda _: None)
        run.resumable.save(Progress(step=3, position=24, skipped_steps=1), durable=True)
    with pytest.raises(DivergedError) as raised:
        OneRank(tiny_data, tmp_path).resumable.restore()
    assert raised.value.exit_code == 70
    for part in ("step_3", "embedding.weight", "echo step_2 >"):
        assert part in str(raised.value)


@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_without_a_configuration_is_a_data_error(tiny_data: Path, tmp_path: Path) -> None:
    run = OneRank(tiny_data, tmp_path)
    run.train_and_save()
    for config in (None, {"run": {"nam": "x"}}):
        with refused(DataError):
            run.resumable._check_origin(run.folder / "step_2", Restored(2, {"config": config}, {}))


@pytest.mark.usefixtures("one_rank")
def test_other_data_under_the_same_path_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    tiny_dataset(data)
    OneRank(data, tmp_path).train_and_save()
    shutil.rmtree(data)
    tiny_dataset(data, seed=1)
    with refused(DataError) as raised:
        OneRank(data, tmp_path).resumable.restore()
    assert raised.value.exit_code == 65
    assert "captions_train.bin: 4032 bytes, sha256" in str(raised.value)


class Counter:
    """A controller with one number as its state."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state(self) -> JsonValue:
        return {"value": self.value}

    def restore(self, state: JsonValue) -> None:
        self.value = state["value"]


@pytest.mark.usefixtures("one_rank")
def test_controllers_go_on_by_name(tiny_data: Path, tmp_path: Path) -> None:
    OneRank(tiny_data, tmp_path, {"bias": Counter(5), "decay": Counter(6)}).train_and_save()
    mine = {"bias": Counter(0), "decay": Counter(0)}
    OneRank(tiny_data, tmp_path, mine).resumable.restore()
    assert {name: counter.value for name, counter in mine.items()} == {"bias": 5, "decay": 6}
    with refused(DataError):
        OneRank(tiny_data, tmp_path, {"bias": Counter(0)}).resumable.restore()


@pytest.mark.usefixtures("one_rank")
def test_states_of_levers_that_are_no_mapping_are_refused(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without levers also refuses such a state."""
    OneRank(tiny_data, tmp_path).train_and_save()
    resumable = OneRank(tiny_data, tmp_path).resumable
    checkpoints = resumable._checkpoints  # pyright: ignore[reportPrivateUsage]
    load = checkpoints.load

    def spoilt(*arguments: Any) -> Restored:
        restored = load(*arguments)
        return replace(restored, values={**restored.values, "levers": 5})

    monkeypatch.setattr(checkpoints, "load", spoilt)
    with refused(DataError, "levers", golden=False):
        resumable.restore()


@pytest.mark.parametrize(
    ("step", "evaluated", "every", "last", "owed"),
    [
        (0, 0, 5, 60, False),
        (10, 5, 5, 60, True),
        (10, 10, 5, 60, False),
        (10, 5, 4, 60, False),  # the interval changed on resume
        (10, 8, 4, 10, True),  # the interval and the last step changed on resume
    ],
)
def test_an_evaluation_is_owed_where_one_is_due_and_not_kept(
    step: int, evaluated: int, every: int, last: int, owed: bool
) -> None:
    assert Progress(step=step, evaluated=evaluated).owes_evaluation(every, last) is owed
