"""Sums of rows that are added in slices have the bits of one sum over all rows."""

from unittest import mock

import torch

from moe_dist.moe.kernels import torch_kernels as rows


def test_rows_of_another_dtype_are_added_in_slices_and_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    index_Q = torch.randint(0, 5, (100,), generator=generator)
    rows_QD = torch.randn(100, 7, generator=generator).bfloat16()
    at_once = torch.zeros(5, 7).index_add_(0, index_Q, rows_QD.float())
    converted = []
    to = torch.Tensor.to

    def noted(self: torch.Tensor, *args: torch.dtype) -> torch.Tensor:
        converted.append(self.shape[0])
        return to(self, *args)

    with mock.patch.object(rows, "SLICE_BYTES", 30 * 7 * 4), mock.patch.object(torch.Tensor, "to", noted):
        in_slices = rows.add_rows(torch.zeros(5, 7), index_Q, rows_QD)
    assert converted == [30, 30, 30, 10]
    assert torch.equal(in_slices, at_once)


def test_no_rows_and_rows_wider_than_a_slice() -> None:
    with mock.patch.object(rows, "SLICE_BYTES", 4):
        none = rows.add_rows(torch.ones(3, 7), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 7).bfloat16())
        one = rows.add_rows(torch.ones(3, 7), torch.tensor([1]), torch.ones(1, 7).bfloat16())
    assert torch.equal(none, torch.ones(3, 7))
    assert one[:, 0].tolist() == [1.0, 2.0, 1.0]
