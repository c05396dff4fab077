"""Makes batches of training and held-out sequences from a prepared data set.

The training stream depends only on (data, seed, skip, position). Sequence q of the stream is the same for any number of
ranks and any micro-batch size, so a checkpoint saves only the number of sequences that have been drawn."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_dist.data.batch import Batch, BatchMaker, Segment
from moe_dist.data.dealing import Deal, Dealing, deal
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.order import Mixture, Packing, Pieces, ShuffledEpochs, cut, micro_batches, number_at, pack
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import Manifest, SplitSection
from moe_dist.formats.split_files import tokens_by_modality

_HELDOUT_WINDOW = 512


class TrainLoader:
    """Makes the training batches of one rank.

    The documents of a source are shuffled once, in an order that depends on (seed, source), and packed into sequences. Each
    epoch of a source has these sequences, and thus each document once, in a new order. A resumed run reads no sequence
    before its position. Packing a million documents takes about 3 s. Each piece of a document keeps 32 bytes in memory.

    Args:
        folder: Folder of the data set.
        weights: Fraction of sequences from each source; other sources are not used. If empty, fractions are in proportion
            to the sources' tokens.
        pack_window: Number of pieces of documents that are packed at a time.
        most_patches: Largest number of patches of pictures in a sequence; None for no limit.
        skip: Pairs (first, last), ascending, of sequences that the stream leaves out. Positions do not count them.
        seed: Seeds all shuffles.
        global_batch: Number of sequences per step on all ranks together; a multiple of world_size x micro_batch.
        micro_batch: Number of sequences in a micro-batch of one rank.
        dealing: Settings for dealing the sequences of a step to ranks; None keeps the order of the stream. With a dealing,
            every rank reads the whole step to know the costs of all sequences.

    Raises:
        ConfigError: weights name an unknown source.
        DataError: files are damaged or disagree with the manifest.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        *,
        seq_len: int,
        weights: Mapping[str, float],
        pack_window: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        dealing: Dealing | None = None,
        skip: Sequence[tuple[int, int]] = (),
        most_patches: int | None = None,
    ) -> None:
        self._dealing, self._skip = dealing, skip
        self._dealt: dict[int, Deal] = {}  # maps positions to the deals of the last steps
        self._share = {"global_batch": global_batch, "micro_batch": micro_batch, "rank": rank, "world_size": world_size}
        self._mixture = Mixture(source_shares(manifest, weights))
        room = Room(seq_len, pack_window, most_patches)
        self._streams = {
            name: _Stream(folder, name, manifest.sources[name].train, room, seed=seed) for name in self._mixture.names
        }
        for source in manifest.sources.values():
            if source.valid is not None and source.valid.pictures is not None:
                _check_fits(IndexedSplit(folder, source.valid), room)  # before the first step, not at the first evaluation
        self._maker = _batch_maker(folder, manifest, seq_len)
        self._tokens = {
            name: tokens_by_modality(folder, manifest.sources[name].train, manifest) for name in self._mixture.names
        }

    @property
    def sequences_per_epoch(self) -> dict[str, int]:
        """Maps each source to the number of sequences in one epoch of this source."""
        return {name: len(stream) for name, stream in self._streams.items()}

    def batches(self, position: int) -> list[Batch]:
        """Returns this rank's micro-batches of the step that starts at `position` of the global stream. Raises DataError if
        a token id in the data is outside the vocabulary."""
        return [self._maker.make([self.sequence(at) for at in each]) for each in self.numbers(position)]

    def numbers(self, position: int) -> Sequence[Sequence[int]]:
        """Returns the numbers (in the stream) of the sequences in `batches(position)`."""
        if self._dealing is None:
            places = micro_batches(position, **self._share)
        else:
            places = (position + self.dealt(position).place_IWB[:, self._share["rank"]]).tolist()
        return [[number_at(place, self._skip) for place in each] for each in places]

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources of the stream."""
        return self._mixture.names

    def sources(self, position: int) -> np.ndarray:
        """Returns which sequences of `batches(position)` are of each source, float64 [micro-batches, sources, rows]."""
        found_IB = [[self._mixture.place(number)[0] for number in each] for each in self.numbers(position)]
        return (np.array(found_IB)[:, None] == np.array(self.source_names)[:, None]).astype(np.float64)

    def dealt(self, position: int) -> Deal:
        """Returns the deal of the step that starts at `position`. Keeps the deals of the last steps. A trace needs them
        while a thread reads the next step; at that time no other code may read data."""
        if position not in self._dealt:
            assert self._dealing is not None, "the loader deals nothing"
            costs, ep, mix = self._dealing
            ranks, count = self._share["world_size"], self._share["global_batch"]
            sequences = [self.sequence(number_at(place, self._skip)) for place in range(position, position + count)]
            cost_Q2 = np.array([costs.of(*self._maker.count(each)) for each in sequences])
            micro = count // (ranks * self._share["micro_batch"])
            recent = dict(list(self._dealt.items())[-2:])
            self._dealt = {**recent, position: deal(cost_Q2, micro_batches=micro, ranks=ranks, ep=ep, mix=mix)}
        return self._dealt[position]

    def sequence(self, number: int) -> list[Segment]:
        """Returns the pieces of documents that make up sequence `number` of the global stream."""
        source, index = self._mixture.place(number)
        return self._streams[source].sequence(index)

    def epochs(self, position: int) -> dict[str, float]:
        """Maps each modality to the mean number of times that a training token of this modality occurs in the first
        `position` sequences of the stream; 0 if the sources in use have no such token."""
        drawn = self._mixture.drawn(end := number_at(position, self._skip))
        for first, last in self._skip:
            before, behind = (self._mixture.drawn(min(end, each)) for each in (first, last + 1))
            drawn = {name: count - behind[name] + before[name] for name, count in drawn.items()}
        modalities = next(iter(self._tokens.values()))
        epochs = {}
        for modality in modalities:
            total = sum(tokens[modality] for tokens in self._tokens.values())
            seen = sum(self._tokens[name][modality] * count / len(self._streams[name]) for name, count in drawn.items())
            epochs[modality] = seen / total if total else 0.0
        return epochs


class ReadAhead:
    """Reads the batches of the next step in a thread while the current step is computed.

    Only one thread at a time may read from a loader, so call `settle` before other code reads batches from the loader.

    Args:
        read: Method of a loader that returns the batches of the step that starts at a position of the global stream.
    """

    def __init__(self, read: Callable[[int], list[Batch]]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def batches(self, position: int, *, following: int | None) -> list[Batch]:
        """Returns the batches at `position`, and starts to read those at `following`, which is None if there is no next
        step.

        Raises:
            Any error of `read` at `position`. An error at `following` is raised when a later call requests those batches.
        """
        self.settle()
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead is not None and ahead[0] == position else self._read(position)
        if following is not None:
            self._ahead = following, self._thread.submit(self._read, following)
        return batches

    def settle(self) -> None:
        """Waits until the thread has finished reading."""
        if self._ahead is not None:
            self._ahead[1].exception()  # waits without raising; a later `batches` raises the error


def heldout_batches(
    folder: str | Path,
    manifest: Manifest,
    *,
    source: str,
    seq_len: int,
    sequences: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    validation: bool = False,
    most_patches: int | None = None,
) -> list[Batch]:
    """Returns this rank's batches of at most `sequences` held-out sequences of a source, evenly spaced in the held-out
    split. With `validation`, returns batches of equally many other sequences of that split.

    Every rank gets the same number of batches. If there are too few sequences, the last batches have rows of padding. A
    source without a held-out split gives no batch. The choice of sequences does not depend on world_size or micro_batch.

    Raises:
        ConfigError: the source is unknown, or no sequence is left for `validation`.
        DataError: files are damaged or disagree with the manifest.
    """
    if source not in manifest.sources:
        raise ConfigError(f"source {source!r} is not in the manifest; there are {', '.join(manifest.sources)}")
    split = manifest.sources[source].valid
    if split is None:
        return []
    data = IndexedSplit(folder, split)
    pieces, packing = _packed(data, slice(None), Room(seq_len, _HELDOUT_WINDOW, most_patches))
    count = min(sequences, len(packing))
    chosen = [len(packing) * number // count for number in range(count)]
    if validation:
        if not (others := sorted(set(range(len(packing))) - set(chosen))):
            raise ConfigError(f"all {len(packing)} held-out sequences of {source} are in the test; ask for fewer sequences")
        count = min(sequences, len(others))
        chosen = [others[len(others) * number // count] for number in range(count)]
    maker = _batch_maker(folder, manifest, seq_len, lazily=True)
    run = world_size * micro_batch
    batches = []
    for first in range(rank * micro_batch, -(-count // run) * run, run):
        mine = chosen[first : first + micro_batch]
        rows = [_segments(data, pieces, packing, sequence) for sequence in mine]
        batches.append(maker.make(rows + [[]] * (micro_batch - len(rows))))
    return batches


def source_shares(manifest: Manifest, weights: Mapping[str, float]) -> dict[str, float]:
    """Maps each source in use to its fraction of the sequences, in the manifest's order. The fractions sum to 1. Raises
    ConfigError if `weights` names an unknown source."""
    unknown = sorted(set(weights) - set(manifest.sources))
    if unknown:
        raise ConfigError(f"data.weights names {', '.join(unknown)}; the manifest has {', '.join(manifest.sources)}")
    used = {
        name: weights[name] if weights else float(source.train.tokens)
        for name, source in manifest.sources.items()
        if not weights or name in weights
    }
    return {name: share / sum(used.values()) for name, share in used.items()}


class Room(NamedTuple):
    """The limits of a sequence, and the number of pieces that are packed at a time."""

    seq_len: int
    window: int
    most_patches: int | None


def _check_fits(data: IndexedSplit, room: Room) -> None:
    """Raises ConfigError if a document with pictures does not fit into a sequence."""
    lengths_D, patches_D = data.lengths_D, data.patches_D
    for key, most, sizes_D in (("seq_len", room.seq_len, lengths_D), ("most_patches", room.most_patches, patches_D)):
        if most is not None and len(large := sizes_D[(patches_D > 0) & (sizes_D > most)]):
            raise ConfigError(
                f"data.{key}={most}: {len(large):,} documents with pictures in {data.prefix} need more, the largest "
                f"{large.max():,}, and none is cut; raise it, or prepare the data with --most-tokens and --skip-bad"
            )


def _packed(data: IndexedSplit, order: np.ndarray | slice, room: Room) -> tuple[Pieces, Packing]:
    """Cuts and packs documents. Raises ConfigError if a document with pictures does not fit into a sequence."""
    _check_fits(data, room)
    lengths_D, patches_D, (seq_len, window, most_patches) = data.lengths_D, data.patches_D, room
    pieces = cut(data.starts_D[order], lengths_D[order], seq_len=seq_len)
    patches_P = patches_D[data.document_of(pieces.start_P)]
    return pieces, pack(pieces.length_P, seq_len=seq_len, window=window, patches_P=patches_P, most_patches=most_patches)


class _Stream:
    """The endless stream of one source's sequences, epoch after epoch."""

    def __init__(self, folder: str | Path, name: str, split: SplitSection, room: Room, *, seed: int) -> None:
        self._data = IndexedSplit(folder, split)
        named = (seed, zlib.crc32(name.encode()))
        order = np.random.default_rng(named).permutation(len(self._data.starts_D))
        self._pieces, self._packing = _packed(self._data, order, room)
        if not len(self._packing):
            raise DataError(f"{self._data.prefix}: holds no token; name a source with training tokens")
        self._epochs = ShuffledEpochs(named, len(self._packing))

    def __len__(self) -> int:
        return len(self._packing)

    def sequence(self, index: int) -> list[Segment]:
        return _segments(self._data, self._pieces, self._packing, self._epochs.at(index))


def _segments(data: IndexedSplit, pieces: Pieces, packing: Packing, sequence: int) -> list[Segment]:
    segments = []
    for piece in packing.pieces_of(sequence):
        start, length = int(pieces.start_P[piece]), int(pieces.length_P[piece])
        count = length + int(pieces.goes_on_P[piece])
        bits = data.filler(start, count), length, data.prompt(start, count)
        segments.append(Segment(data.tokens(start, count), *bits, data.pictures(start)))
    return segments


def _batch_maker(folder: str | Path, manifest: Manifest, seq_len: int, *, lazily: bool = False) -> BatchMaker:
    options: dict[str, Any] = {"seq_len": seq_len, "pad_id": manifest.pad_id}
    options["modalities"] = tuple(manifest.modalities.values())
    if manifest.pictures is None:
        return BatchMaker(**options)
    from moe_dist.data.picture_encoder import PictureBatchMaker  # imported late, because it needs transformers

    pictures = Path(folder) / manifest.pictures.folder
    return PictureBatchMaker(folder=Path(folder), pictures=pictures, lazily=lazily, **options)
