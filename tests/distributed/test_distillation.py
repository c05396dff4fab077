"""Distillation refuses a teacher that does not fit the student's model or data; with a fitting teacher the KL falls.

test_n_ranks_equal_one.py compares the KL on several ranks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import ConfigError, MoeDistError
from tests.distributed.test_starting_weights import AUX, PARTS, SEED, Run
from tests.support.worlds import RankContext


def taught(rank: RankContext, data: Path, root: Path, changes: dict[str, Any], teacher: dict[str, Any]) -> Any:
    """Trains a teacher with one expert per group, and a student for two steps. Returns the KL of each step, or the
    error message. A student with `run.init_from` begins with those weights."""
    Run(rank, data, root, "teacher", {**SEED, **teacher}).train_and_save()
    section = {"loss.distillation": {"teacher": str(root / "teacher"), "weight": 1.0}}
    try:
        student = Run(rank, data, root, "student", {**section, **changes})
    except ConfigError as error:
        return str(error)
    teachers = [name for name, _ in student.training.parallel.model.named_parameters() if "teacher" in name]
    assert not teachers, "it is no part of the checkpoint"
    if "run.init_from" in changes:
        student.begin()
    steps = [student.training.step(student.loader.batches(0), lr=1e-2, aux=AUX) for _ in range(2)]
    return [step.auxiliary for step in steps]


def unreadable_on_rank_1(rank: RankContext, data: Path, root: Path) -> tuple[str, bool]:
    """Starts a student whose teacher only rank 1 cannot read. Returns this rank's error, and whether it follows from an
    error of another rank."""
    Run(rank, data, root, "teacher", SEED).train_and_save()
    teacher = root / "teacher"
    if rank.rank == 1:
        teacher = root / "not mounted here"
    try:
        Run(rank, data, root, "student", {"loss.distillation": {"teacher": str(teacher)}})
    except MoeDistError as error:
        return str(error), error.consequence
    return "", False


def test_a_teacher_that_one_rank_cannot_read_ends_the_run_on_all(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path
) -> None:
    (first, of_other), (second, own) = run_in_world(2, unreadable_on_rank_1, tiny_data, tmp_path)
    assert "cannot load the teacher: it failed on ranks [1]; see the log of rank 1" in first
    assert "not mounted here" in second
    assert (of_other, own) == (True, False)


def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path
) -> None:
    """A student split from the teacher's FFNs starts with KL 0. A student with other weights has a positive KL, which
    falls."""
    same = {
        "run.init_from": str(tmp_path / "same" / "teacher"), "run.init_rules": ["split"], "model.moe.router.scale": 4.0,
        **PARTS,
    }  # fmt: skip
    (tmp_path / "same").mkdir()
    for first, _ in run_in_world(2, taught, tiny_data, tmp_path / "same", same, {}):
        assert first < 1e-6
    for first, second in run_in_world(2, taught, tiny_data, tmp_path, {}, {}):
        assert 1e-3 < second < first


@pytest.mark.parametrize(
    ("teacher", "fault"),
    [
        ({"model.vocab_size": 80}, "its vocab_size=80, model.vocab_size=64; the KL compares word by word"),
        ({"model.max_seq_len": 32, "data.seq_len": 32}, "its max_seq_len=32 is below data.seq_len=64; lower seq_len"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, teacher: dict[str, Any], fault: str
) -> None:
    (told,) = run_in_world(1, taught, tiny_data, tmp_path, {}, teacher)
    assert fault in told
