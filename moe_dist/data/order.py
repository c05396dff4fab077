"""Determines the order of the training sequences, which depends only on seed and position.

`cut` and `pack` put documents into sequences of a fixed length. A document that is longer than a sequence is cut into
pieces. `Mixture` assigns a source to each sequence of the stream, by a fixed pattern. `ShuffledEpochs` gives the sequences
of a source in a new order in each epoch. `micro_batches` gives each rank its part of the sequences of a step. Attention and
positions restart at each piece, so the pieces of a sequence do not influence each other.

Shape letters: D documents, P pieces, Q sequences, S sources.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_dist.errors import ConfigError


@dataclass(frozen=True)
class Pieces:
    """All pieces of a split. A piece is a block of consecutive tokens of one document."""

    start_P: np.ndarray  # int64, index of the piece's first token in the .bin
    length_P: np.ndarray  # int64, number of the piece's tokens, at most the sequence length
    goes_on_P: np.ndarray  # bool, true if the document continues after the piece; the piece's last token then has a label


@dataclass(frozen=True)
class Packing:
    """Lists the pieces in each sequence. Sequence q has the pieces piece_P[first_Q[q] : first_Q[q + 1]], in this order."""

    piece_P: np.ndarray  # int64, indices of all pieces, each exactly once
    first_Q: np.ndarray  # int64 [Q + 1]

    def __len__(self) -> int:
        return len(self.first_Q) - 1

    def pieces_of(self, sequence: int) -> list[int]:
        """Returns the indices of the pieces in a sequence."""
        return self.piece_P[self.first_Q[sequence] : self.first_Q[sequence + 1]].tolist()


def number_at(position: int, skip: Sequence[tuple[int, int]]) -> int:
    """Returns the number, in the stream, of the sequence at `position`. Positions count only sequences outside of `skip`,
    which has pairs (first, last) in ascending order."""
    for first, last in skip:
        if position >= first:
            position += last + 1 - first
    return position


def cut(starts_D: np.ndarray, lengths_D: np.ndarray, *, seq_len: int) -> Pieces:
    """Cuts documents into pieces of at most `seq_len` tokens, in document order. An empty document gives no piece."""
    count_D = -(-lengths_D // seq_len)
    document_P = np.repeat(np.arange(len(lengths_D)), count_D)
    within_P = np.arange(len(document_P)) - np.repeat(np.cumsum(count_D) - count_D, count_D)
    left_P = lengths_D[document_P] - within_P * seq_len
    return Pieces(starts_D[document_P] + within_P * seq_len, np.minimum(left_P, seq_len), left_P > seq_len)


def pack(
    lengths_P: np.ndarray,
    *,
    seq_len: int,
    window: int,
    patches_P: np.ndarray | None = None,
    most_patches: int | None = None,
) -> Packing:
    """Packs each `window` consecutive pieces into sequences, by best fit, with the longest pieces first. The rest is
    padding. `patches_P` has each piece's number of picture patches; the pieces of a sequence have at most `most_patches`
    together.

    The pieces in a sequence are sorted from long to short. `lengths_P` has int64 values from 1 to seq_len. Packing 100,000
    pieces takes about a quarter of a second.
    """
    pieces: list[int] = []
    counts: list[int] = []
    for start in range(0, len(lengths_P), window):
        lengths = lengths_P[start : start + window].tolist()
        patches = None if most_patches is None or patches_P is None else patches_P[start : start + window].tolist()
        for members in _best_fit(lengths, seq_len, patches, most_patches or 0):
            pieces.extend(start + member for member in members)
            counts.append(len(members))
    return Packing(np.array(pieces, np.int64), np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))


def _best_fit(lengths: list[int], seq_len: int, patches: list[int] | None = None, most_patches: int = 0) -> list[list[int]]:
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # sorted pairs (number of free positions, sequence)
    left: list[int] = []  # number of patches that a sequence may still take
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        tightest, own = bisect_left(room, (lengths[piece], 0)), patches[piece] if patches else 0
        while tightest < len(room) and left[room[tightest][1]] < own:
            tightest += 1
        if tightest < len(room):
            free, sequence = room.pop(tightest)
        else:
            free, sequence = seq_len, len(sequences)
            sequences.append([])
            left.append(most_patches)
        sequences[sequence].append(piece)
        left[sequence] -= own
        if free > lengths[piece]:
            insort(room, (free - lengths[piece], sequence))
    return sequences


SLOTS = 1000  # number of sequences after which the pattern of sources is repeated


class Mixture:
    """Interleaves sources in proportion to their positive shares, rounded to multiples of 1 / SLOTS. Each source gets at
    least one slot of the repeated pattern.

    Raises:
        ConfigError: more sources than slots, or a share that is not positive.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        if len(shares) > SLOTS or any(not share > 0 for share in shares.values()):
            raise ConfigError(f"data.weights={dict(shares)}: shares must be positive, of at most {SLOTS} sources")
        self.names = tuple(shares)
        self._slots_S = _slots(np.array(list(shares.values()), np.float64))
        self._pattern = _pattern(self._slots_S)
        # Row s has, for each source, the number of its slots before slot s.
        self._before = np.zeros((SLOTS + 1, len(self.names)), np.int64)
        np.cumsum(self._pattern[:, None] == np.arange(len(self.names)), axis=0, out=self._before[1:])

    def place(self, sequence: int) -> tuple[str, int]:
        """Returns the source of a sequence of the global stream, and the number of the sequence in that source's stream."""
        block, slot = divmod(sequence, SLOTS)
        source = int(self._pattern[slot])
        return self.names[source], block * int(self._slots_S[source]) + int(self._before[slot, source])

    def drawn(self, position: int) -> dict[str, int]:
        """Maps each source to its number of sequences among the first `position` sequences of the global stream."""
        block, slot = divmod(position, SLOTS)
        return dict(zip(self.names, (block * self._slots_S + self._before[slot]).tolist(), strict=True))


def _slots(shares_S: np.ndarray) -> np.ndarray:
    """Returns each source's number of slots, by the method of largest remainders. Each is at least 1; their sum is
    SLOTS."""
    wanted_S = np.maximum(shares_S / shares_S.sum() * SLOTS, 1)
    slots_S = np.floor(wanted_S).astype(np.int64)
    while slots_S.sum() != SLOTS:
        if slots_S.sum() < SLOTS:
            slots_S[np.argmax(wanted_S - slots_S)] += 1
        else:
            slots_S[np.argmax(np.where(slots_S > 1, slots_S - wanted_S, -np.inf))] -= 1
    return slots_S


def _pattern(slots_S: np.ndarray) -> np.ndarray:
    """Returns the source of each slot of the pattern. The next slot always goes to the source whose number of slots so far
    is furthest below its share."""
    given_S = np.zeros_like(slots_S)
    pattern = np.empty(SLOTS, np.int64)
    for slot in range(SLOTS):
        deficit_S = slots_S * (slot + 1) - given_S * SLOTS
        pattern[slot] = np.argmax(np.where(given_S < slots_S, deficit_S, np.iinfo(np.int64).min))
        given_S[pattern[slot]] += 1
    return pattern


class ShuffledEpochs:
    """A random order of `count` items for each epoch. The order depends only on (seed, epoch)."""

    def __init__(self, seed: Sequence[int], count: int) -> None:
        self._seed, self._count = tuple(seed), count
        self._orders: dict[int, np.ndarray] = {}

    def at(self, position: int) -> int:
        """Returns the index of the item at `position`, which counts the items of all epochs."""
        epoch, within = divmod(position, self._count)
        if epoch not in self._orders:
            # The order of a neighbouring epoch is kept, because a step may lie in two epochs.
            self._orders = {known: order for known, order in self._orders.items() if abs(known - epoch) == 1}
            self._orders[epoch] = np.random.default_rng((*self._seed, 1 + epoch)).permutation(self._count)
        return int(self._orders[epoch][within])


def micro_batches(position: int, *, global_batch: int, micro_batch: int, rank: int, world_size: int) -> list[range]:
    """Returns the positions, in the global stream, of the sequences of a rank's micro-batches. The step starts at
    `position`.

    The i-th micro-batches of all ranks together have the i-th block of world_size x micro_batch consecutive positions, and
    rank r has the r-th part of the block. The positions of a whole step therefore do not depend on the number of ranks.
    """
    run = world_size * micro_batch
    assert global_batch % run == 0, (global_batch, world_size, micro_batch)
    first = position + rank * micro_batch
    return [range(start, start + micro_batch) for start in range(first, first + global_batch, run)]
