"""An endless stream of things in shuffled epochs, and what a rank takes of it in a step: functions of seed and position."""

from collections.abc import Sequence

import numpy as np


class ShuffledEpochs:
    """`count` things, epoch after epoch, in an order drawn anew for each from (seed, epoch) alone.

    Args:
        seed: Numbers of the seed.
        count: Things of an epoch, one at least.
    """

    def __init__(self, seed: Sequence[int], count: int) -> None:
        self._seed, self._count = tuple(seed), count
        self._orders: dict[int, np.ndarray] = {}

    def at(self, position: int) -> int:
        """Which thing stands at a position of the stream."""
        epoch, within = divmod(position, self._count)
        if epoch not in self._orders:
            # A step may straddle two epochs; older orders are of no use.
            self._orders = {known: order for known, order in self._orders.items() if abs(known - epoch) == 1}
            self._orders[epoch] = np.random.default_rng((*self._seed, 1 + epoch)).permutation(self._count)
        return int(self._orders[epoch][within])


def micro_batches(position: int, *, global_batch: int, micro_batch: int, rank: int, world_size: int) -> list[range]:
    """Positions of each of a rank's micro-batches in the step that starts at `position`.

    Micro-batch i of all ranks together is the i-th run of world_size * micro_batch positions, and rank r has the r-th part
    of it: the same positions make up a step for any number of ranks. `global_batch` is a multiple of such a run.
    """
    run = world_size * micro_batch
    assert global_batch % run == 0, (global_batch, world_size, micro_batch)
    first = position + rank * micro_batch
    return [range(start, start + micro_batch) for start in range(first, first + global_batch, run)]
