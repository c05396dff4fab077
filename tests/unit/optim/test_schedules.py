import pytest

from moe_dist.config.optimizers.base import CosineSchedule, WsdSchedule
from moe_dist.optim.optimizer import coefficient_at, lr_factor
from tests.support.messages import refused


def factors(total: int, **schedule: object) -> list[float]:
    return [lr_factor(step, total_steps=total, **schedule) for step in range(total)]  # type: ignore[arg-type]


def test_constant_rises_on_a_line_then_stays() -> None:
    assert factors(6, kind="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(2, kind="constant") == [1.0, 1.0]


def test_cosine_reaches_its_floor_at_the_last_step_and_keeps_it() -> None:
    schedule = CosineSchedule(warmup_steps=2, min_ratio=0.1).model_dump()
    values = factors(10, **schedule)
    assert values[:2] == [0.5, 1.0]
    assert values[5] == pytest.approx(0.55)  # halfway between warm-up and end
    assert values[-1] == pytest.approx(0.1)
    assert values[2:] == sorted(values[2:], reverse=True)
    assert lr_factor(25, total_steps=10, **schedule) == pytest.approx(0.1)


def test_wsd_stays_then_falls_on_a_line() -> None:
    schedule = WsdSchedule(warmup_steps=1, decay_steps=4, min_ratio=0.2).model_dump()
    assert factors(8, **schedule) == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_overlapping_warmup_and_decay_take_the_smaller() -> None:
    assert factors(4, kind="wsd", warmup_steps=4, decay_steps=4) == pytest.approx([0.25, 0.5, 0.25, 0.0])
    assert factors(3, kind="cosine", warmup_steps=6) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_unknown_kind_is_refused() -> None:
    with refused(ValueError):
        lr_factor(0, total_steps=1, kind="linear")  # type: ignore[arg-type]


def test_coefficient_is_a_staircase() -> None:
    schedule = ((0, 0.02), (100, 1e-4))
    assert [coefficient_at(schedule, step) for step in (0, 99, 100, 5000)] == [0.02, 0.02, 1e-4, 1e-4]
