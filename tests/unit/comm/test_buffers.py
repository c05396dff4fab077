"""Row buffers reuse memory after release, and never share it between two users."""

import torch

from moe_dist.comm.all_to_all import RowBuffers


def test_what_was_given_back_is_used_again() -> None:
    buffers, like = RowBuffers(), torch.zeros(1, 8)
    first = buffers.take(5, like)
    second = buffers.take(3, like)
    assert first.data_ptr() != second.data_ptr()
    assert first.shape == (5, 8)
    pointer = first.data_ptr()
    buffers.give(first)
    again = buffers.take(2, like.bfloat16())
    assert again.data_ptr() == pointer
    assert again.dtype == torch.bfloat16
    buffers.give(again)
    assert buffers.take(5, like).data_ptr() == pointer, "a smaller use does not shrink it"


def test_no_rows_and_growth() -> None:
    buffers = RowBuffers()
    none = buffers.take(0, torch.zeros(0, 4))
    assert none.shape == (0, 4)
    buffers.give(none)
    assert buffers.take(7, torch.zeros(0, 4)).shape == (7, 4)
