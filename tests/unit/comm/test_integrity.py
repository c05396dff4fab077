"""A row's checksum depends on every bit and on the bit's place in the row; rows may be empty. tests/distributed tests
the checksums of exchanges."""

import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.comm.collectives import CommStats
from moe_dist.comm.integrity import MAX_ROW_BYTES, CheckedAllToAll, content_sums
from tests.support.messages import refused


def slow_sum(row: torch.Tensor) -> int:
    """Computes the checksum word by word with Python's integers, which cannot overflow."""
    data = row.contiguous().view(torch.uint8).numpy().tobytes()
    data += b"\0" * (-len(data) % 4)
    words = [int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data), 4)]
    return sum(word * (((index * 40_503) & 0x7FFF) | 1) for index, word in enumerate(words))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_the_sum_is_that_of_a_loop_over_words(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(width)
    rows = (torch.randn(5, width) * 1e6).to(dtype)
    assert content_sums(rows).tolist() == [slow_sum(row) for row in rows]
    assert content_sums(rows[:, 0]).tolist() == [slow_sum(row[:1]) for row in rows]  # one number per row


def test_every_single_bit_changes_the_sum() -> None:
    row = torch.randn(1, 6).to(torch.bfloat16)
    before = content_sums(row).item()
    for bit in range(6 * 16):
        changed = row.clone()
        changed.view(torch.uint8)[0, bit // 8] ^= 1 << bit % 8
        assert content_sums(changed).item() != before


def test_the_longest_row_is_summed_exactly() -> None:
    """All words are -2^31, the int32 of largest magnitude. If the sum overflowed, it would differ from the sum in
    Python's integers."""
    row = torch.full((1, MAX_ROW_BYTES // 4), -(1 << 31), dtype=torch.int32)
    assert content_sums(row).tolist() == [slow_sum(row[0])]
    with refused(AssertionError):
        content_sums(torch.zeros(1, MAX_ROW_BYTES + 4, dtype=torch.uint8))


def test_the_identity_wire_is_not_checked() -> None:
    wire = CheckedAllToAll(AllToAll(None, CommStats(events=[])))
    assert wire.exchange(torch.ones(0, 4), Splits((0,), (0,)), name="rows").shape == (0, 4)
    assert wire.comm_stats.events == []
