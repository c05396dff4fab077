"""Which exit codes are followed by a restart."""

from pathlib import Path

import pytest

from launchers.restart import AttemptEnd, committed_step, is_final, why_not_restarted


@pytest.mark.parametrize("code", [0, 65, 69, 70, 75, 78])
def test_repeatable_errors_and_successful_ends_are_final(code: int) -> None:
    assert is_final(code)


@pytest.mark.parametrize("code", [1, 33, 134, 137])
def test_anything_else_is_started_again_up_to_the_limit(code: int) -> None:
    ends = [AttemptEnd(code, 10 * number, 10 * number + 10) for number in range(4)]
    assert not is_final(code)
    assert [why_not_restarted(ends[:count], 3) for count in (1, 2, 3)] == [None] * 3
    assert "restarted 3 times already" in str(why_not_restarted(ends, 3))
    assert why_not_restarted(ends[:1], 0) is not None


def test_two_attempts_in_a_row_without_a_new_checkpoint_end_it() -> None:
    gained, stuck = AttemptEnd(1, 0, 10), AttemptEnd(1, 10, 10)
    assert why_not_restarted([stuck], 9) is None
    assert why_not_restarted([gained, stuck], 9) is None
    assert why_not_restarted([stuck, gained, stuck], 9) is None
    assert "committed no checkpoint after step 10" in str(why_not_restarted([gained, stuck, stuck], 9))


@pytest.mark.parametrize(("text", "step"), [("step_40\n", 40), ("step_x", 0), ("", 0), (None, 0)])
def test_the_step_of_the_newest_checkpoint(tmp_path: Path, text: str | None, step: int) -> None:
    if text is not None:
        (tmp_path / "latest").write_text(text)
    assert committed_step(tmp_path) == step


def test_two_stops_at_the_first_step_in_a_row_end_it() -> None:
    """As under a time limit of at most signal_seconds: each attempt saves the one step in which it was stopped."""
    one, more = AttemptEnd(75, 4, 5), AttemptEnd(75, 4, 6)
    assert why_not_restarted([one], 9) is None
    assert why_not_restarted([one, more], 9) is None
    assert "stopped at their first step, the last at step 6; a longer time limit" in str(
        why_not_restarted([one, AttemptEnd(75, 5, 6)], 9)
    )
    assert why_not_restarted([AttemptEnd(1, 4, 5), AttemptEnd(1, 5, 6)], 9) is None, "a fault that saved a step has gained"
