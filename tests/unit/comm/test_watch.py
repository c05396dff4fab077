"""What a rank is in: entered, left, in flight on a device, and among collectives that nobody notes."""

import pytest
import torch

from moe_dist.comm import watch as watch_file
from moe_dist.comm.reduce import sum_over
from moe_dist.comm.watch import Watch, watched

CPU = torch.device("cpu")


def test_a_rank_is_in_a_collective_until_it_leaves_it() -> None:
    watch = Watch()
    assert watch.oldest() is None
    with watch.inside("rows", device=CPU, layer="layers.3", send=[0, 5], receive=[0, 7]):
        position = watch.oldest()
        assert position is not None
        assert (position.collective, position.layer, position.entered) == ("rows", "layers.3", 1)
        assert (position.send, position.receive) == ((0, 5), (0, 7))
    assert watch.oldest() is None
    assert watch.entered == 1


def test_the_oldest_of_several_counts() -> None:
    watch = Watch()
    with watch.inside("first", device=CPU), watch.inside("second", device=CPU):
        position = watch.oldest()
        assert position is not None
        assert position.collective == "first"


def test_a_collective_that_raises_was_left() -> None:
    watch = Watch()
    with pytest.raises(RuntimeError), watch.inside("rows", device=CPU):
        raise RuntimeError
    assert watch.oldest() is None


def test_on_cuda_it_is_left_when_the_stream_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [False]
    monkeypatch.setattr(watch_file, "_passed", lambda device: lambda: passed[0])
    watch = Watch()
    with watch.inside("rows", device=torch.device("cuda")):
        pass
    with watch.inside("sum", device=CPU):
        pass
    position = watch.oldest()
    assert position is not None
    assert position.collective == "rows"  # the call has returned, the collective has not run
    passed[0] = True
    assert watch.oldest() is None


def test_among_unnoted_collectives_time_runs_from_the_last_noted_one() -> None:
    watch = Watch()
    with watch.among("gradients"):
        before = watch.oldest()
        with watch.inside("rows", device=CPU):
            inside = watch.oldest()
        after = watch.oldest()
    assert before is not None
    assert inside is not None
    assert after is not None
    assert [before.collective, inside.collective, after.collective] == ["gradients", "rows", "gradients"]
    assert (before.entered, after.entered) == (0, 1)
    assert after.since >= inside.since >= before.since
    assert watch.oldest() is None


def test_without_a_watch_or_a_group_nothing_is_noted() -> None:
    with watched(None, "rows", device=CPU):
        pass
    watch = Watch()
    sum_over(torch.ones(1), None, watch=watch)
    assert watch.entered == 0
