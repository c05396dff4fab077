"""Each row of a batch is one sample, and only its answer is scored. The position alone determines the order of samples."""

from pathlib import Path

import numpy as np
import torch

from moe_dist.data.batch import IGNORED, Batch
from moe_dist.train.router_tuning.loader import SampleLoader, SampleMaker
from moe_dist.train.router_tuning.samples import Samples, TuningSample
from tests.support.tuned import MANIFEST


def loader(folder: Path, rank: int = 0, world_size: int = 1, micro_batch: int = 4) -> SampleLoader:
    return SampleLoader(
        Samples(folder),
        SampleMaker(MANIFEST),
        seed=3,
        global_batch=8,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
    )


def test_rows_are_scored_on_the_answer_alone() -> None:
    """The prompt 1 2 3 with the answer 4 5, and the prompt 6 with the picture 100 as answer, give two rows of four
    tokens."""
    samples = [TuningSample(np.array([1, 2, 3]), np.array([4, 5])), TuningSample(np.array([6]), np.array([100]))]
    batch = SampleMaker(MANIFEST).make(samples, [7, 9])
    no = IGNORED
    assert batch.tokens_BS.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]
    assert batch.labels_BS.tolist() == [[no, no, 4, 5], [100, no, no, no]]
    assert batch.label_modality_BS.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
    assert batch.padding_BS.tolist() == [[False] * 4, [False, True, True, True]]
    assert batch.probe_tokens_B.tolist() == [2, 4], "the last token of each prompt, among all tokens of the batch"
    assert batch.numbers == (7, 9)
    assert batch.num_tokens == 5
    assert type(batch.to("cpu")) is Batch


def test_no_sample_is_a_row_of_padding() -> None:
    batch = SampleMaker(MANIFEST).make([])
    assert batch.padding_BS.tolist() == [[True]]
    assert batch.probe_tokens_B.shape == (0,)


def test_ranks_and_micro_batches_share_one_stream(folder: Path) -> None:
    alone = loader(folder)
    for position in (0, 16):  # the second batch spans two epochs of 20 samples
        wanted = [number for batch in alone.batches(position) for number in batch.numbers]
        parts = [loader(folder, rank, 2, 2).batches(position) for rank in range(2)]
        found = [number for micro in range(2) for rank in range(2) for number in parts[rank][micro].numbers]
        assert found == wanted


def test_each_sample_once_an_epoch_in_another_order(folder: Path) -> None:
    found = loader(folder)
    epochs = [[found.number(20 * epoch + place) for place in range(20)] for epoch in range(3)]
    assert all(sorted(order) == list(range(20)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [found.number(place) for place in range(20)] == epochs[0], "and back again"
    assert found.epochs(30) == {"text": 1.5, "image": 1.5}


def test_rows_hold_their_samples(folder: Path) -> None:
    samples = Samples(folder)
    (batch, _) = loader(folder).batches(0)
    for row, number in enumerate(batch.numbers):
        sample = samples.sample(number)
        scored = batch.labels_BS[row] != IGNORED
        torch.testing.assert_close(batch.labels_BS[row][scored], torch.from_numpy(sample.answer))
        assert batch.tokens_BS.flatten()[batch.probe_tokens_B[row]] == sample.prompt[-1]
