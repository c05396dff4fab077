"""Tests the tensors of small batches whose expected values were written by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.data.batch import IGNORED, Batch, BatchMaker, Segment
from moe_dist.errors import DataError
from tests.support.messages import refused

PAD = 9


def segment(tokens: list[int], filler: list[int], length: int) -> Segment:
    return Segment(np.array(tokens), np.array(filler, bool), length)


def make(sequences: list[list[Segment]]) -> Batch:
    # Ids 0 to 3 and 8 to 9 are text, 4 to 7 image.
    return BatchMaker(seq_len=8, pad_id=PAD, modalities=(((0, 4), (8, 10)), ((4, 8),))).make(sequences)


def test_by_hand() -> None:
    whole = segment([1, 4, 5, 2], [0, 0, 1, 0], 4)  # a whole document
    piece = segment([7, 3, 6], [1, 0, 1], 2)  # a document's first two tokens; its third, 6, is only a label
    batch = make([[whole, piece], []])
    no = IGNORED
    assert batch.tokens_BS.tolist() == [[1, 4, 5, 2, 7, 3, PAD, PAD], [PAD] * 8]
    assert batch.labels_BS.tolist() == [[4, 5, 2, no, 3, 6, no, no], [no] * 8]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1], list(range(8))]
    assert batch.documents_BS.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2], [0] * 8]
    assert batch.modality_BS.tolist() == [[0, 1, 1, 0, 1, 0, 0, 0], [0] * 8]
    assert batch.label_modality_BS.tolist() == [[1, 1, 0, 0, 0, 1, 0, 0], [0] * 8]
    assert batch.filler_BS.int().tolist() == [[0, 1, 0, 0, 0, 1, 0, 0], [0] * 8]
    assert batch.padding_BS.int().tolist() == [[0, 0, 0, 0, 0, 0, 1, 1], [1] * 8]
    assert batch.num_tokens == 6
    types = [str(getattr(batch, name).dtype)[6:] for name in Batch.__dataclass_fields__]
    assert types == ["int64", "int64", "int64", "int32", "int64", "int64", "bool", "bool"]


def test_a_prompt_is_read_and_not_scored() -> None:
    prompt = np.array([True, True, True, False, False])
    whole = Segment(np.array([1, 4, 5, 2, 3]), np.array([0, 1, 0, 0, 0], bool), 5, prompt)
    # a piece of the document 5 2 3 with the first two tokens as inputs
    piece = Segment(np.array([5, 2, 3]), np.zeros(3, bool), 2, np.array([True, False, False]))
    batch = make([[whole, piece]])
    no = IGNORED
    assert batch.tokens_BS.tolist() == [[1, 4, 5, 2, 3, 5, 2, PAD]]
    assert batch.labels_BS.tolist() == [[no, no, 2, 3, no, 2, 3, no]]
    assert batch.label_modality_BS.tolist() == [[0, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.filler_BS.int().tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(("tokens", "length"), [([1, 10], 2), ([1, 10], 1), ([-1, 2], 2)])
def test_ids_outside_the_vocabulary_are_refused(tokens: list[int], length: int) -> None:
    with refused(DataError, "vocab_size=10"):
        make([[segment(tokens, [0, 0], length)]])


def test_a_copy_to_a_gpu_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is copied as one buffer with elements of 8, 4 and 1 bytes. With an odd number of tokens the 8-byte
    elements must still be aligned."""
    generator = torch.Generator().manual_seed(0)
    integers = [torch.randint(-100, 1 << 40, (3, 5), generator=generator) for _ in range(5)]
    flags = [torch.rand(3, 5, generator=generator) < 0.5 for _ in range(2)]
    a, b, c, d, e = integers
    batch = Batch(a, b, c, a.to(torch.int32), d, e, *flags)
    copies: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **named: (copies.append((args, named)), self.clone())[1])
    moved = batch.to("cuda")
    assert copies == [(("cuda",), {"non_blocking": True})]
    for name, tensor in vars(batch).items():
        assert getattr(moved, name).dtype == tensor.dtype
        assert torch.equal(getattr(moved, name), tensor), name
