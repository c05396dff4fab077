"""In hand-made cases each fault gets its hint, and healthy numbers get no hint."""

from collections.abc import Callable

import numpy as np
import pytest

from moe_dist.monitor.hints import HintWatch, busy_rank, full_memory, slow_rank, slower
from moe_dist.monitor.metrics import Record
from moe_dist.monitor.routing_hints import Hint, WindowSums, routing_hints
from moe_dist.monitor.training_hints import loss_trend
from moe_dist.placement.placement import ExpertGroup
from tests.unit.monitor.conftest import MakeRecord

LAYERS = (1, 3)


def choices(text: list[int], image: list[int], text_null: int = 50, image_null: int = 50) -> np.ndarray:
    """Returns the choices of two layers, with columns for 4 text experts, 4 image experts, and 2 null experts of each
    group. The second layer differs only in its image experts, whose loads are equal."""
    nulls = [text_null, text_null, image_null, image_null]
    return np.array([[*text, *image, *nulls], [*text, 25, 25, 25, 25, *nulls]])


EVEN = [25, 25, 25, 25]
TOKENS = 100  # tokens of each group


def routing(
    choices_LC: np.ndarray, groups: tuple[ExpertGroup, ...], *, tokens: int = TOKENS, dropped: int = 0
) -> list[Hint]:
    per_group = np.full((len(choices_LC), len(groups)), 1)
    return list(routing_hints(WindowSums(choices_LC, tokens * per_group, dropped * per_group, 50, 0.02), groups, LAYERS))


def test_a_busy_expert_is_named_with_its_layer(groups: tuple[ExpertGroup, ...]) -> None:
    (hint,) = routing(choices(EVEN, [5, 5, 5, 85]), groups)
    assert hint.kind == "busy/image"
    assert hint.text == (
        "image expert 3 takes 85% of its group's tokens in layer 1, 3.4 x the mean expert (25%); see moe/load/image in "
        "TensorBoard; try a larger coefficient in loss.balance.schedule (now 0.02)"
    )
    assert not routing(choices(EVEN, [10, 10, 10, 70]), groups)


def test_few_choices_prove_nothing(groups: tuple[ExpertGroup, ...]) -> None:
    assert not routing(np.array([[0, 1, 9, 2] * 2 + [5, 5, 5, 5]]), groups, tokens=9)


def test_a_rank_the_others_wait_for() -> None:
    (hint,) = busy_rank(np.array([[10.0, 10, 70, 10], [25, 25, 25, 25]]))
    assert hint.text.startswith("rank 2 of the EP group computes most rows, and the busiest rank of a layer computes 1.9 x")
    assert not list(busy_rank(np.array([[25.0, 25, 35, 15]])))
    assert not list(busy_rank(np.array([[9.0]])))
    assert not list(busy_rank(np.zeros((1, 4))))
    (hint,) = busy_rank(np.array([[90.0, 10], [10, 90]]))
    assert "computes 1.8 x the mean rank's rows (at most 2 x is possible)" in hint.text, "the others wait in each layer"


def test_a_loss_that_rises_or_stays() -> None:
    first, noisy = [5.0] * 5, [2.0, 2.4, 1.6, 2.2, 1.8]
    (rose,) = loss_trend([2.0] * 5 + [2.05] * 5, first, 5)
    assert rose.text.startswith("the loss rose from 2.000 to 2.050 (medians of 5 steps)")
    (stays,) = loss_trend([4.98] * 10, first, 5)
    assert stays.text.startswith("the loss does not fall: 4.980 now, 5.000 at first")
    assert not list(loss_trend([2.0] * 5 + [2.03] * 5, first, 5)), "a small rise is no news"
    assert not list(loss_trend([*noisy, *(loss + 0.2 for loss in noisy)], first, 5)), "within the noise"
    assert not list(loss_trend([4.0] * 5 + [3.9] * 5, first, 5))
    assert not list(loss_trend([5.0] * 9, first, 5))
    assert not list(loss_trend([2.0] * 10, (), 5))
    assert not list(loss_trend([4.98] * 10, first, 5, trained=True)), "a trained model may have little left to learn"
    assert list(loss_trend([4.98] * 10, first, 5, 1e-5, trained=True)), "its updates are too small"


def test_a_run_that_slows_down() -> None:
    (hint,) = slower([1000.0] * 30 + [400.0] * 10)
    assert hint.text.startswith("tokens a second fell from 1,000 to 400")
    assert not list(slower([1000.0] * 39 + [1.0])), "one slow step is no news"
    assert not list(slower([1000.0] * 10 + [1.0] * 10))


@pytest.fixture
def healthy(make_record: MakeRecord) -> Callable[..., Record]:
    """Returns a function that makes steps without faults: choices and ranks are even, and the loss falls."""

    def make(step: int, **changes: object) -> Record:
        even: dict[str, object] = {
            "choices_LC": np.array([[25] * 4 + [25] * 4 + [20] * 4] * 3),
            "tokens_LG": np.full((3, 2), 70),
            "nll_M": np.array([200.0, 100.0]) * 0.99**step,
        }
        return make_record(step, **{**even, **changes})

    return make


def kinds(hints: list[Hint]) -> list[str]:
    return [hint.kind for hint in hints]


def test_hints_wait_for_a_window_and_are_repeated_after_a_while(
    healthy: MakeRecord, groups: tuple[ExpertGroup, ...]
) -> None:
    watch = HintWatch(groups, (1, 3, 5), window=10, quiet=25)
    busy = np.array([[25] * 4 + [1, 1, 97, 1] + [20] * 4] * 3)
    said = [(step, kind) for step in range(1, 61) for kind in kinds(watch.update(healthy(step, choices_LC=busy)))]
    assert [step for step, kind in said if kind == "busy/image"] == [10, 35, 60]
    assert {kind for _, kind in said} == {"busy/image", "rank"}, "the rank that holds the busy expert is the busiest too"


def test_one_odd_batch_says_nothing(healthy: MakeRecord, groups: tuple[ExpertGroup, ...]) -> None:
    watch = HintWatch(groups, (1, 3, 5), window=20)
    odd = np.array([[25] * 4 + [0, 0, 100, 0] + [20] * 4] * 3)
    records = [healthy(step, choices_LC=odd) if step == 25 else healthy(step) for step in range(1, 40)]
    assert not [hint for record in records for hint in watch.update(record)]


def test_a_flat_loss_late_in_a_run_is_no_news(healthy: MakeRecord, groups: tuple[ExpertGroup, ...]) -> None:
    flat = np.array([60.0, 60.0])
    resumed = HintWatch(groups, (1, 3, 5), window=10)
    assert not [h for step in range(5001, 5060) for h in resumed.update(healthy(step, nll_M=flat))]
    fresh = HintWatch(groups, (1, 3, 5), window=10)
    assert [k for step in range(1, 60) for k in kinds(fresh.update(healthy(step, nll_M=flat)))] == ["loss"]


def busy(rank: int | None = None, *, others: float = 0.1, times: float = 1.0) -> np.ndarray:
    seconds_W = np.full(4, others)
    if rank is not None:
        seconds_W[rank] *= times
    return seconds_W


def memory(retries: list[float]) -> np.ndarray:
    """Returns the memory of three ranks, each with 60 GB allocated and 70 GB reserved."""
    return np.array([[60_000.0, 70_000.0, each] for each in retries])


def test_a_rank_without_free_memory_is_named() -> None:
    (hint,) = full_memory([memory([2, 0, 5]), memory([2, 0, 5]), memory([2, 3, 5])])
    assert hint.kind == "memory"
    assert "rank 1 found no free GPU memory 3 times in the last 2 steps" in hint.text
    assert "at most 60,000 MiB in use and 70,000 MiB reserved" in hint.text
    assert not list(full_memory([memory([2, 0, 5])] * 3)), "retries of earlier steps are no news"
    assert not list(full_memory([]))


def test_a_slow_rank_is_named_with_numbers() -> None:
    (hint,) = slow_rank([busy(2, times=2.1)] * 20)
    assert hint.kind == "slow"
    assert "rank 2 computes and reads data for 0.210 s a step, the others for 0.100 s (2.1 x)" in hint.text


@pytest.mark.parametrize(
    "seconds",
    [
        [busy()] * 20,
        [busy(1, times=1.4)] * 20,
        [busy(1, times=9.0)] * 5 + [busy()] * 15,  # only a few slow steps
        [busy(1, others=1e-4, times=9.0)] * 20,  # differences within noise
        [busy(1, times=9.0)] * 3,  # too few steps
        [np.zeros(0)] * 20,  # no times known
        [np.ones(1)] * 20,  # a single rank
    ],
)
def test_ranks_that_are_alike_or_noisy_are_not_called_slow(seconds: list[np.ndarray]) -> None:
    assert list(slow_rank(seconds)) == []
