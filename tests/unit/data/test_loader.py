"""Tests the training stream and the held-out batches. Each token tells to which document it belongs."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_dist.data.batch import IGNORED, Batch
from moe_dist.data.dealing import Dealing, SequenceCosts
from moe_dist.data.loader import TrainLoader, heldout_batches, source_shares
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest
from tests.support.messages import refused

SEQ_LEN = 16
# The tokens of document d are d * 40 + 200, d * 40 + 201, and so on. With up to 39 tokens, some documents are cut into
# three pieces.
LENGTHS = np.random.default_rng(0).integers(1, 40, 60).tolist()


def document(number: int, length: int) -> list[int]:
    return list(range(200 + 40 * number, 200 + 40 * number + length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_set) -> tuple[Path, Manifest]:
    documents = [document(number, length) for number, length in enumerate(LENGTHS)]
    path = tmp_path_factory.mktemp("loader")
    return path, make_set(path, {"a": (documents[:40], documents[40:]), "b": (documents[40:], None)})


def loader(
    data: tuple[Path, Manifest], *, world_size: int = 1, rank: int = 0, micro_batch: int = 1, **changes
) -> TrainLoader:
    arguments = {"seq_len": SEQ_LEN, "weights": {}, "pack_window": 8, "seed": 3, "global_batch": 8} | changes
    return TrainLoader(*data, micro_batch=micro_batch, rank=rank, world_size=world_size, **arguments)


def tokens_of(batches: list[Batch]) -> Counter[int]:
    return Counter(int(token) for batch in batches for token in batch.tokens_BS[~batch.padding_BS])


def rows(batches: list[Batch]) -> list[list[int]]:
    return [row.tolist() for batch in batches for row in batch.tokens_BS]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_document_is_seen_once_an_epoch(folder: tuple[Path, Manifest], world_size: int) -> None:
    ranks = [loader(folder, weights={"a": 1.0}, world_size=world_size, rank=rank) for rank in range(world_size)]
    epoch = ranks[0].sequences_per_epoch["a"]
    everything = [token for number in range(40) for token in document(number, LENGTHS[number])]
    stream = global_stream(ranks, 2 * epoch)
    for half in (stream[:epoch], stream[epoch:]):
        assert sorted(token for row in half for token in row if token) == everything
    assert stream[:epoch] != stream[epoch:], "ordered anew"


def global_stream(ranks: list[TrainLoader], count: int) -> list[list[int]]:
    """Returns the first `count` sequences of the global stream, joined from the batches of all ranks."""
    stream: list[list[int]] = []
    for position in range(0, count, 8):
        batches = [rank.batches(position) for rank in ranks]
        for micro in zip(*batches, strict=True):
            stream.extend(rows(list(micro)))
    return stream[:count]


def test_the_stream_is_the_same_for_any_number_of_ranks(folder: tuple[Path, Manifest]) -> None:
    expected = global_stream([loader(folder)], 200)
    for world_size, micro_batch in ((1, 8), (2, 1), (2, 4), (4, 2), (8, 1)):
        ranks = [loader(folder, world_size=world_size, rank=rank, micro_batch=micro_batch) for rank in range(world_size)]
        assert global_stream(ranks, 200) == expected
        assert len(ranks[0].batches(0)) == 8 // (world_size * micro_batch)


def test_the_stream_is_a_pure_function_of_position(folder: tuple[Path, Manifest]) -> None:
    forward = loader(folder)
    there = [rows(forward.batches(position)) for position in range(0, 400, 8)]
    back = loader(folder)
    assert [rows(back.batches(position)) for position in range(392, -1, -8)] == there[::-1]
    assert rows(loader(folder, seed=4).batches(0)) != there[0]


@pytest.mark.parametrize("dealt", [False, True])
def test_skipped_sequences_are_left_out_of_the_stream(folder: tuple[Path, Manifest], dealt: bool) -> None:
    """Only the skipped sequences are missing. All other sequences keep their order on any number of ranks. In traces
    they have the numbers of the stream without skips."""
    skip = ((0, 0), (3, 11), (40, 90), (91, 91))
    left_out = {number for first, last in skip for number in range(first, last + 1)}
    whole = global_stream([loader(folder)], 200)
    expected = [row for number, row in enumerate(whole) if number not in left_out]
    costs = SequenceCosts(np.arange(SEQ_LEN + 1.0) ** 2, np.array([1.0, 1.0]))
    dealing = Dealing(costs, ep=1, mix=True) if dealt else None
    ranks = [loader(folder, world_size=2, rank=rank, skip=skip, dealing=dealing) for rank in range(2)]
    found = global_stream(ranks, 128)
    for begin in range(0, 128, 8):
        rows_of_step = (sorted if dealt else list)(found[begin : begin + 8])
        assert rows_of_step == (sorted if dealt else list)(expected[begin : begin + 8])
        numbers = [number for rank in ranks for each in rank.numbers(begin) for number in each]
        assert [whole[n] for n in sorted(numbers)] == expected[begin : begin + 8]


def test_skipped_sequences_count_in_no_epoch(folder: tuple[Path, Manifest]) -> None:
    skip = ((2, 9), (30, 61))
    one, all_of_them = loader(folder, skip=skip, global_batch=1), loader(folder, global_batch=1)
    for position in (0, 2, 3, 21, 22, 23, 90):
        numbers = [number for at in range(position) for (number,) in one.numbers(at)]
        steps = [[all_of_them.epochs(number + each)["text"] for each in (0, 1)] for number in numbers]
        assert one.epochs(position)["text"] == pytest.approx(sum(after - before for before, after in steps))


def test_labels_follow_their_document_and_nothing_crosses(folder: tuple[Path, Manifest]) -> None:
    one = loader(folder, weights={"a": 1.0})
    labels: Counter[int] = Counter()
    for position in range(0, one.sequences_per_epoch["a"], 8):
        for number, batch in enumerate(one.batches(position)):
            if position + number >= one.sequences_per_epoch["a"]:
                break
            scored = batch.labels_BS != IGNORED
            assert torch.equal(batch.labels_BS[scored], batch.tokens_BS[scored] + 1)
            assert not (scored & batch.padding_BS).any()
            labels.update(batch.labels_BS[scored].tolist())
            for row in range(len(batch.tokens_BS)):
                for segment in batch.documents_BS[row].unique():
                    mine = batch.documents_BS[row] == segment
                    assert len(batch.padding_BS[row][mine].unique()) == 1
                    assert batch.positions_BS[row][mine].tolist() == list(range(int(mine.sum())))
                    if not batch.padding_BS[row][mine][0]:
                        assert len(((batch.tokens_BS[row][mine] - 200) // 40).unique()) == 1
    # Every token but a document's first is a label once, because the pieces of a cut document are continued.
    expected = Counter(token for number in range(40) for token in document(number, LENGTHS[number])[1:])
    assert labels == expected


def test_epochs_of_each_modality(tmp_path: Path, make_set) -> None:
    text, mixed = [[300] * 10] * 8, [[300] * 4 + [150] * 12] * 4
    data = (tmp_path, make_set(tmp_path, {"text": (text, None), "mixed": (mixed, None)}))
    one = loader(data, weights={"text": 1.0, "mixed": 3.0})
    assert one.sequences_per_epoch == {"text": 8, "mixed": 4}
    assert one.epochs(0) == {"text": 0.0, "image": 0.0}
    # 4 of the 16 sequences are half of an epoch of `text`, which has 80 tokens. The other 12 are three epochs of `mixed`,
    # each with 16 text and 48 image tokens.
    assert one.epochs(16) == {"text": pytest.approx((0.5 * 80 + 3 * 16) / 96), "image": pytest.approx(3.0)}
    seen = Counter(source for q in range(16) for source in [int(one.sequence(q)[0].tokens[-1])])
    assert seen == {300: 4, 150: 12}


def test_counts_that_a_manifest_leaves_out_are_counted(tmp_path: Path, make_set) -> None:
    manifest = make_set(tmp_path, {"mixed": ([[300] * 4 + [150] * 12] * 4, None)})
    values = manifest.model_dump(mode="json")
    values["sources"]["mixed"]["train"]["tokens_by_modality"] = {}
    bare = Manifest.model_validate_json(json.dumps(values))
    assert loader((tmp_path, bare)).epochs(6) == loader((tmp_path, manifest)).epochs(6)


def test_shares(folder: tuple[Path, Manifest]) -> None:
    _, manifest = folder
    tokens = [manifest.sources[name].train.tokens for name in "ab"]
    assert source_shares(manifest, {}) == {"a": tokens[0] / sum(tokens), "b": tokens[1] / sum(tokens)}
    assert source_shares(manifest, {"b": 3.0, "a": 1.0}) == {"a": 0.25, "b": 0.75}
    with refused(ConfigError):
        source_shares(manifest, {"c": 1.0})


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 7), (2, 3), (4, 2), (16, 4)])
@pytest.mark.parametrize("sequences", [1, 10, 1000])
def test_heldout_batches_are_the_same_sequences_for_any_ranks(
    folder: tuple[Path, Manifest], world_size: int, micro_batch: int, sequences: int
) -> None:
    def batches(world_size: int, micro_batch: int) -> list[list[Batch]]:
        return [
            heldout_batches(
                *folder,
                source="a",
                seq_len=SEQ_LEN,
                sequences=sequences,
                micro_batch=micro_batch,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]

    ranks = batches(world_size, micro_batch)
    assert len({len(rank) for rank in ranks}) == 1
    assert {len(batch.tokens_BS) for rank in ranks for batch in rank} == {micro_batch}
    expected = tokens_of(batches(1, 1)[0])
    assert sum((tokens_of(rank) for rank in ranks), Counter()) == expected
    whole = Counter(token for number in range(40, 60) for token in document(number, LENGTHS[number]))
    assert expected == whole if sequences == 1000 else expected < whole


def test_heldout_sequences_are_spread_over_the_side(tmp_path: Path, make_set) -> None:
    data = (tmp_path, make_set(tmp_path, {"a": ([[1]], [[200 + number] * SEQ_LEN for number in range(100)])}))
    few = heldout_batches(*data, source="a", seq_len=SEQ_LEN, sequences=5, micro_batch=5, rank=0, world_size=1)
    assert few[0].tokens_BS[:, 0].tolist() == [200, 220, 240, 260, 280]


def test_validation_has_the_other_heldout_sequences(tmp_path: Path, make_set) -> None:
    data = (tmp_path, make_set(tmp_path, {"a": ([[1]], [[200 + number] * SEQ_LEN for number in range(8)])}))
    arguments = {"source": "a", "seq_len": SEQ_LEN, "micro_batch": 8, "rank": 0, "world_size": 1}

    def firsts(sequences: int, *, validation: bool) -> list[int]:
        (batch,) = heldout_batches(*data, sequences=sequences, validation=validation, **arguments)
        return [int(first) for first in batch.tokens_BS[:, 0] if first >= 200]

    assert firsts(4, validation=False) == [200, 202, 204, 206]
    assert firsts(4, validation=True) == [201, 203, 205, 207]
    assert firsts(6, validation=True) == sorted({*range(200, 208)} - {*firsts(6, validation=False)})
    with refused(ConfigError, "all 8 held-out sequences of a are in the test; ask for fewer"):
        firsts(8, validation=True)


def test_filler_goes_with_its_label(tmp_path: Path, make_set) -> None:
    bits = [0, 1, 0, 1, 1, 0, 0, 0, 1, 0]
    documents = [[150, 151, 152, 153], [154, 155, 156, 157, 158, 159]]
    data = (tmp_path, make_set(tmp_path, {"a": (documents, None)}, {"a_train": bits}))
    for batch in loader(data, seq_len=4, global_batch=4).batches(0):
        scored = batch.labels_BS != IGNORED
        assert batch.filler_BS[scored].tolist() == [bool(bits[label - 150]) for label in batch.labels_BS[scored].tolist()]
        assert not batch.filler_BS[~scored].any()


def test_prompts_are_read_and_not_scored(tmp_path: Path, make_set) -> None:
    bits = [1, 1, 0, 0, 1, 1, 1, 0, 0, 0]
    documents = [[150, 151, 152, 153], [154, 155, 156, 157, 158, 159]]
    data = (tmp_path, make_set(tmp_path, {"a": (documents, documents)}, prompt={"a_train": bits, "a_valid": bits}))
    trained = loader(data, seq_len=4, global_batch=4).batches(0)
    held_out = heldout_batches(*data, source="a", seq_len=4, sequences=4, micro_batch=4, rank=0, world_size=1)
    for batches in (trained, held_out):
        read, scored = set(), set()
        for batch in batches:
            read |= set(batch.tokens_BS[~batch.padding_BS].tolist())
            scored |= set(batch.labels_BS.flatten().tolist()) - {IGNORED}
        assert read == set(range(150, 160))
        assert scored == {152, 153, 157, 158, 159}


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 1), (2, 4), (4, 2), (4, 1)])
def test_dealt_ranks_have_the_steps_sequences(folder: tuple[Path, Manifest], world_size: int, micro_batch: int) -> None:
    """Together the ranks get the same sequences for the step as without dealing. The position alone determines each
    rank's sequences."""
    dealing = Dealing(SequenceCosts(np.arange(SEQ_LEN + 1.0) ** 2, np.array([1.0, 1.0])), ep=1, mix=True)
    changes = {"world_size": world_size, "micro_batch": micro_batch, "dealing": dealing}
    ranks = [loader(folder, rank=rank, **changes) for rank in range(world_size)]
    differs = False
    for position in (0, 8, 160):
        dealt = [rank.batches(position) for rank in ranks]
        plain = rows(loader(folder).batches(position))
        assert sorted(row for batches in dealt for row in rows(batches)) == sorted(plain)
        assert rows(dealt[1]) == rows(loader(folder, rank=1, **changes).batches(position))
        named = [[ranks[1].sequence(number) for number in each] for each in ranks[1].numbers(position)]
        assert tokens_of(dealt[1]) == Counter(
            int(t) for each in named for row in each for s in row for t in s.tokens[: s.length]
        )
        differs |= [row for batches in dealt for row in rows(batches)] != plain
    assert differs
