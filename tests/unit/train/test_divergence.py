"""Tests when a run on one rank saves and how it ends if steps are skipped. tests/distributed/test_divergence.py tests
causes, several ranks and engines."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_dist.checkpoint.verify import verify
from moe_dist.errors import DivergedError, StoppedError
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.train.loop.trainer import Trainer
from tests.support.one_rank import OneRank, world_of_one


class Stop:
    requested = False


@contextmanager
def started(data: Path, root: Path, skipped: set[int], **changes: Any) -> Iterator[tuple[Trainer, Path, list[int]]]:
    """Yields a run's trainer, its checkpoint folder, and the list of steps that it saves. The steps in `skipped` have
    no finite gradient."""
    saved: list[int] = []
    with world_of_one():
        one = OneRank(data, root, **{"evaluation.balance_efficiency": False, **changes})
        with one.trainer() as trainer:
            norm_squared, save = one.training.step._norm_squared, trainer.saver.save
            one.training.step._norm_squared = lambda: (
                norm_squared() + (math.nan if trainer.progress.step + 1 in skipped else 0.0)
            )

            def noted(progress: Any, *, durable: bool) -> None:
                save(progress, durable=durable)
                saved.append(progress.step)

            trainer.saver.save = noted  # pyright: ignore[reportAttributeAccessIssue]
            yield trainer, one.folder, saved


def test_a_save_waits_for_the_next_step_that_is_not_skipped(tiny_data: Path, tmp_path: Path) -> None:
    """Steps 2, 3, 4 and 6 are skipped. Step 5 resets the count of consecutive skipped steps, so the limit of 4 is not
    reached."""
    changes = {"train.steps": 9, "train.max_skipped_in_a_row": 4, "checkpoint.every": 3, "evaluation.every": 9}
    with started(tiny_data, tmp_path, {2, 3, 4, 6}, **changes) as (trainer, _, saved):
        trainer.fit()
    assert saved == [5, 7, 9]


def test_a_stop_in_a_skipped_step_saves_nothing(tiny_data: Path, tmp_path: Path) -> None:
    changes = {"train.steps": 9, "checkpoint.every": 2, "evaluation.every": 9}
    with started(tiny_data, tmp_path, {4}, **changes) as (trainer, folder, saved):
        trainer.stop = stop = Stop()  # pyright: ignore[reportAttributeAccessIssue]
        step = trainer._step

        def stopping() -> Any:
            stop.requested = trainer.progress.step == 3
            return step()

        trainer._step = stopping  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(StoppedError) as raised:
            trainer.fit()
        assert saved == [2]
        assert (
            f"after step 4; the last step was skipped, so that it is not saved; the newest checkpoint is {folder}/step_2"
            in (str(raised.value))
        )


@pytest.mark.parametrize(("skipped", "every", "newest"), [({4}, 2, "step_2"), ({1, 2, 3, 4}, 1, None)], ids=str)
def test_a_run_whose_last_step_is_skipped_has_diverged(
    tiny_data: Path, tmp_path: Path, skipped: set[int], every: int, newest: str | None
) -> None:
    changes = {"checkpoint.every": every}
    with started(tiny_data, tmp_path, skipped, **changes) as (trainer, folder, _), pytest.raises(DivergedError) as raised:
        trainer.fit()
    assert raised.value.exit_code == 70
    text = str(raised.value)
    assert f"in {len(skipped)} steps in a row, up to step 4 (train.steps=4," in text
    if newest is None:
        assert "no checkpoint was saved, so that the same command begins at step 1" in text
    else:
        assert f"the newest checkpoint {folder / newest} is finite and from before the first skipped step 4" in text


def test_the_attempt_after_a_divergence_offers_the_ways_on(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with world_of_one():
        one = OneRank(tiny_data, tmp_path)
        with one.trainer():
            RunFolder.of(one.plan.config).write_status(verdict=70, reason="REASON", last_step=4, attempt_id="one")
        assert "diverged" not in capsys.readouterr().out
        with one.trainer(attempt_id="two"):
            pass
    assert "the attempt before this one diverged after step 4: REASON\nthis attempt goes on after step 0\n" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("final", [False, True])
def test_a_last_held_out_loss_that_is_not_finite_is_a_divergence(tiny_data: Path, tmp_path: Path, final: bool) -> None:
    """If a loss of the last evaluation is not finite, the run ends and the last step is not saved. A loss of an earlier
    evaluation does not end the run."""
    with started(tiny_data, tmp_path, set()) as (trainer, folder, saved):
        evaluate = trainer.evaluator

        class Broken:
            calibration, batches = 0, evaluate.batches

            def __call__(self, step: int, **options: Any) -> Any:
                result = evaluate(step, **options)
                return replace(result, loss={**result.loss, "text": math.nan}) if options["final"] is final else result

        trainer.evaluator = Broken()  # pyright: ignore[reportAttributeAccessIssue]
        if not final:
            trainer.fit()
            assert saved == [2, 4]
            return
        with pytest.raises(
            DivergedError, match=r"held-out loss after the last step, 4, is not finite \(text nan, image \d"
        ):
            trainer.fit()
        assert saved == [2]
        assert verify(folder / "step_2")[1] == []
