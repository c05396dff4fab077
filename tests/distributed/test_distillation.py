"""Distillation on ranks is that on one rank, and a run begins only with a teacher that fits its model and its data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.errors import ConfigError, MoeDistError
from tests.distributed.test_starting_weights import AUX, PARTS, SEED, Run
from tests.support.cover import full
from tests.support.layouts import Layout, Outcome, train
from tests.support.outcomes import assert_same_tensors
from tests.support.worlds import RankContext


@pytest.fixture(scope="module")
def one_rank(run_in_world: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    start = tmp_path_factory.mktemp("start")
    return start, run_in_world(1, train, Layout(distilled=True), start)[0]


@pytest.mark.parametrize(
    "layout",
    [Layout(2, 1, "pinned", "fsdp2", "block", distilled=True), full(Layout(1, 2, distilled=True))],
    ids=str,
)
def test_ranks_equal_one_rank(
    run_in_world: Callable[..., list[Any]], one_rank: tuple[Path, Outcome], layout: Layout
) -> None:
    """The KL, the gradients and three steps; the batches have prompts, padding, and a rank without a label."""
    start, alone = one_rank
    outcomes = run_in_world(layout.world_size, train, layout, start)
    for outcome in outcomes:
        for step, expected in zip(outcome.steps, alone.steps, strict=True):
            assert expected.auxiliary > 0.01
            np.testing.assert_allclose(
                [step.auxiliary, *step.nll_M, step.grad_norm],
                [expected.auxiliary, *expected.nll_M, expected.grad_norm],
                rtol=1e-9,
            )
    assert_same_tensors(outcomes, alone)


def taught(rank: RankContext, data: Path, root: Path, changes: dict[str, Any], teacher: dict[str, Any]) -> Any:
    """Trains a teacher of one expert a group and a student of it for two steps; what the student's steps say, or why it was
    refused."""
    Run(rank, data, root, "teacher", {**SEED, **teacher}).train_and_save()
    section = {"loss.distillation": {"teacher": str(root / "teacher"), "weight": 1.0}}
    try:
        student = Run(rank, data, root, "student", {**section, **changes})
    except ConfigError as error:
        return str(error)
    teachers = [name for name, _ in student.training.parallel.model.named_parameters() if "teacher" in name]
    assert not teachers, "it is no part of the checkpoint"
    steps = [student.training.step(student.loader.batches(0), lr=1e-2, aux=AUX) for _ in range(2)]
    return [step.auxiliary for step in steps]


def unreadable_on_rank_1(rank: RankContext, data: Path, root: Path) -> tuple[str, bool]:
    """Reads a teacher that rank 1 cannot read; what each rank says, and whether another rank knows the reason."""
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
    """The parts of the teacher's FFNs: KL 0. With other weights it is above 0 and falls."""
    same = {
        "run.init_from": str(tmp_path / "same" / "teacher"), "run.init_rules": ["split"], "model.moe.router.scale": 4.0,
        **PARTS,
    }  # fmt: skip
    (tmp_path / "same").mkdir()
    for rank, told in enumerate(run_in_world(2, taught_from_it, tiny_data, tmp_path / "same", same)):
        assert told < 1e-6, rank
    for first, second in run_in_world(2, taught, tiny_data, tmp_path, {}, {}):
        assert 1e-3 < second < first


def taught_from_it(rank: RankContext, data: Path, root: Path, changes: dict[str, Any]) -> float:
    """The KL of a student that begins with its teacher's weights."""
    Run(rank, data, root, "teacher", SEED).train_and_save()
    student = Run(rank, data, root, "student", {"loss.distillation": {"teacher": str(root / "teacher")}, **changes})
    student.begin()
    return student.training.step(student.loader.batches(0), lr=1e-2, aux=AUX).auxiliary


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
