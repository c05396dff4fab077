"""An endless stream in shuffled epochs, and a rank's share of a step. Pure functions of seed and position."""

from collections.abc import Sequence

import numpy as np


class ShuffledEpochs:
    """`count` items in each epoch; the order of an epoch is drawn from (seed, epoch) alone.

    Args:
        seed: Integers of the seed.
        count: Items in an epoch, at least 1.
    """

    def __init__(self, seed: Sequence[int], count: int) -> None:
        self._seed, self._count = tuple(seed), count
        self._orders: dict[int, np.ndarray] = {}

    def at(self, position: int) -> int:
        """Index of the item at a position of the stream."""
        epoch, within = divmod(position, self._count)
        if epoch not in self._orders:
            # A step may straddle two epochs, so the orders of neighbouring epochs are kept.
            self._orders = {known: order for known, order in self._orders.items() if abs(known - epoch) == 1}
            self._orders[epoch] = np.random.default_rng((*self._seed, 1 + epoch)).permutation(self._count)
        return int(self._orders[epoch][within])


def micro_batches(position: int, *, global_batch: int, micro_batch: int, rank: int, world_size: int) -> list[range]:
    """Positions of a rank's micro-batches in the step that starts at `position`.

    Micro-batch i of all ranks covers the i-th run of world_size * micro_batch positions, and rank r takes the r-th part of
    the run. So a step has the same positions for any number of ranks. `global_batch` is a multiple of the run's length.
    """
    run = world_size * micro_batch
    assert global_batch % run == 0, (global_batch, world_size, micro_batch)
    first = position + rank * micro_batch
    return [range(start, start + micro_batch) for start in range(first, first + global_batch, run)]
