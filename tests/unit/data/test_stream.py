"""The stream of shuffled epochs, and the ranks' parts of a step, drawn by hand."""

from moe_dist.data.order import ShuffledEpochs, micro_batches


def test_each_thing_comes_once_an_epoch_from_any_position_on() -> None:
    epochs = ShuffledEpochs((3, 7), 10)
    stream = [epochs.at(position) for position in range(40)]
    for first in range(0, 40, 10):
        assert sorted(stream[first : first + 10]) == list(range(10))
    assert stream[:10] != stream[10:20], "drawn anew"
    backwards = ShuffledEpochs((3, 7), 10)
    assert [backwards.at(position) for position in reversed(range(40))] == stream[::-1]
    assert [ShuffledEpochs((3, 8), 10).at(position) for position in range(40)] != stream


def test_parts_of_a_step_by_hand() -> None:
    """8 positions from 16 on, 2 per micro-batch: ranks 0 and 1 take 16 17 | 18 19, then 20 21 | 22 23."""
    parts = [
        [list(each) for each in micro_batches(16, global_batch=8, micro_batch=2, rank=rank, world_size=2)]
        for rank in range(2)
    ]
    assert parts == [[[16, 17], [20, 21]], [[18, 19], [22, 23]]]
    (whole,) = micro_batches(16, global_batch=8, micro_batch=8, rank=0, world_size=1)
    assert list(whole) == list(range(16, 24))
