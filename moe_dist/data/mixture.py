"""Assigns each sequence of the global stream to a source, as a closed form of its number.

A pattern of SLOTS slots repeats. So the state of the data stream is a single integer, the number of sequences drawn, for
any number of sources, ranks and epochs.

Shape letters: S sources.
"""

from collections.abc import Mapping

import numpy as np

from moe_dist.errors import ConfigError

SLOTS = 1000


class Mixture:
    """Interleaves sources in proportion to their shares, rounded to 1 / SLOTS; each source gets at least one slot.

    Args:
        shares: Positive share of each source; any sum.

    Raises:
        ConfigError: more sources than slots, or a share that is not positive.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        if len(shares) > SLOTS or any(not share > 0 for share in shares.values()):
            raise ConfigError(f"data.weights={dict(shares)}: shares must be positive, of at most {SLOTS} sources")
        self.names = tuple(shares)
        self._slots_S = _slots(np.array(list(shares.values()), np.float64))
        self._pattern = _pattern(self._slots_S)
        # Row s counts, for each source, its slots before slot s.
        self._before = np.zeros((SLOTS + 1, len(self.names)), np.int64)
        np.cumsum(self._pattern[:, None] == np.arange(len(self.names)), axis=0, out=self._before[1:])

    def place(self, sequence: int) -> tuple[str, int]:
        """Source of a sequence of the global stream, and its number in that source's own stream."""
        block, slot = divmod(sequence, SLOTS)
        source = int(self._pattern[slot])
        return self.names[source], block * int(self._slots_S[source]) + int(self._before[slot, source])

    def drawn(self, position: int) -> dict[str, int]:
        """Sequences of each source among the first `position` of the global stream."""
        block, slot = divmod(position, SLOTS)
        return dict(zip(self.names, (block * self._slots_S + self._before[slot]).tolist(), strict=True))


def _slots(shares_S: np.ndarray) -> np.ndarray:
    """Number of slots of each source, by largest remainder, at least 1; their sum is SLOTS."""
    wanted_S = np.maximum(shares_S / shares_S.sum() * SLOTS, 1)
    slots_S = np.floor(wanted_S).astype(np.int64)
    while slots_S.sum() != SLOTS:
        if slots_S.sum() < SLOTS:
            slots_S[np.argmax(wanted_S - slots_S)] += 1
        else:
            slots_S[np.argmax(np.where(slots_S > 1, slots_S - wanted_S, -np.inf))] -= 1
    return slots_S


def _pattern(slots_S: np.ndarray) -> np.ndarray:
    """Source of each slot: always the source that is furthest behind its share."""
    given_S = np.zeros_like(slots_S)
    pattern = np.empty(SLOTS, np.int64)
    for slot in range(SLOTS):
        deficit_S = slots_S * (slot + 1) - given_S * SLOTS
        pattern[slot] = np.argmax(np.where(given_S < slots_S, deficit_S, np.iinfo(np.int64).min))
        given_S[pattern[slot]] += 1
    return pattern
