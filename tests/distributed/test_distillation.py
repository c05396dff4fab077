"""A run starts only with a teacher that fits its model and its data, and approaches it.

test_n_ranks_equal_one.py compares the KL on several ranks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.formats.manifest import load_manifest
from moe_dist.train.build.training import loop_settings
from tests.distributed.test_starting_weights import AUX, PARTS, SEED, Run, groups
from tests.support.worlds import RankContext


def taught(rank: RankContext, data: Path, root: Path, changes: dict[str, Any], teacher: dict[str, Any]) -> Any:
    """Trains a teacher with one expert per group, and a student for two steps. Returns the KL of each step, or the
    refusal."""
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
    """Reads a teacher that only rank 1 cannot read. Returns the error on this rank, and whether it is a consequence of
    another's."""
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
    """A student split from the teacher's FFNs starts with KL 0. From other weights the KL is positive and falls."""
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
    """Returns the KL of a student that starts with its teacher's weights."""
    Run(rank, data, root, "teacher", SEED).train_and_save()
    student = Run(rank, data, root, "student", {"loss.distillation": {"teacher": str(root / "teacher")}, **changes})
    student.begin()
    return student.training.step(student.loader.batches(0), lr=1e-2, aux=AUX).auxiliary


def mixture(rank: RankContext, data: Path, root: Path) -> None:
    Run(rank, data, root, "mixture", {**groups((4, 0, 2), (2, 0, 1)), "parallel.ep": 1}).train_and_save(steps=16)


def with_nulls(rank: RankContext, data: Path, root: Path, weight: float) -> list[tuple[float, float, float]]:
    """Trains the mixture with copied null rows, with itself as teacher, and with a `null_split` loss that wants fewer true
    experts. Returns the KL, the gradient norm and the true experts per token of each step."""
    changes = {
        **groups((4, 4, 4), (2, 2, 2)),
        "run.init_from": str(root / "mixture"),
        "run.init_rules": ["copy_nulls"],
        "loss.balance": {
            "kind": "null_split",
            "scope": "micro_batch",
            "null_weight": {"text": 2.0, "image": 2.0},
            "schedule": [[0, 1.0]],
        },
        "loss.distillation": {"teacher": str(root / "mixture"), "weight": weight},
        # one micro-batch per step, because the balance loss is computed over its tokens
        "train.micro_batch": 8 // rank.world_size,
    }
    run = Run(rank, data, root, f"student-{rank.world_size}-{weight}", changes)
    run.begin()
    plan = loop_settings(run.config, load_manifest(data), run.training.step.placement)
    told = []
    for number in range(16):
        step = run.training.step(run.loader.batches(8 * number), lr=1e-2, aux=plan.aux(number))
        counts = step.counts
        active = float(counts.choices_LC[:, :6].sum() / counts.tokens_LG.sum())
        told.append((step.auxiliary / weight, step.grad_norm, active))
    return told


def test_null_experts_a_split_balance_loss_and_a_teacher_work_together(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path
) -> None:
    """Tests the chain of docs/adapt.md for mixtures. The student starts equal to its teacher, departs while the balance
    loss removes experts, and comes back. Without the KL in its loss it stays away."""
    run_in_world(1, mixture, tiny_data, tmp_path)
    (alone,) = run_in_world(1, with_nulls, tiny_data, tmp_path, 0.7)
    for of_rank in run_in_world(2, with_nulls, tiny_data, tmp_path, 0.7):
        np.testing.assert_allclose(of_rank, alone, rtol=1e-5, atol=1e-7)
    (untaught,) = run_in_world(1, with_nulls, tiny_data, tmp_path, 1e-9)
    kl, active = [step[0] for step in alone], [step[2] for step in alone]
    assert kl[0] < 1e-6
    assert active[-1] < 0.8 * active[0]
    assert kl[-1] < 0.5 * max(kl)
    assert kl[-1] < 0.5 * untaught[-1][0]


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
