"""Tests the modality ids of tokens, and which of these ids a rank takes."""

import pytest
import torch

from moe_dist.errors import ConfigError
from moe_dist.megatron.modality import groups_of_rank, modality_of_tokens
from tests.support.messages import refused

IDS_BS = torch.tensor([[0, 1, 2, -1], [2, 0, 0, 1]])
GROUP_OF_MODALITY = torch.tensor([0, 1, 1, -1])
# Hidden states are [s, B, D]: first position 0 of both sequences, then position 1 of both, and so on.
GROUPS = [0, 1, 1, 0, 1, 0, -1, 1]


def test_modality_by_vocabulary_range() -> None:
    tokens_BS = torch.tensor([[0, 9, 10, 19], [20, 29, 30, 31]])
    ids_BS = modality_of_tokens(tokens_BS, [[(0, 10), (30, 31)], [(10, 20)], [(20, 30)]])
    assert ids_BS.tolist() == [[0, 0, 1, 1], [2, 2, 0, -1]]


@pytest.mark.parametrize("tp_rank", [0, 1])
def test_a_rank_slices_a_whole_mask_and_uses_a_scattered_one_unchanged(tp_rank: int) -> None:
    expected = GROUPS[tp_rank * 4 : tp_rank * 4 + 4]
    scattered = IDS_BS[:, tp_rank * 2 : tp_rank * 2 + 2]
    for mask_BS in (IDS_BS, scattered):
        groups_T = groups_of_rank(mask_BS, GROUP_OF_MODALITY, length=2, batch=2, tp_rank=tp_rank, tp_size=2)
        assert groups_T.tolist() == expected


def test_one_modality_takes_megatrons_boolean_mask_or_none() -> None:
    one = torch.tensor([0, -1])
    mask_BS = torch.tensor([[False, True], [True, False]])
    assert groups_of_rank(mask_BS, one, length=2, batch=2, tp_rank=0, tp_size=1).tolist() == [0, -1, -1, 0]
    assert groups_of_rank(None, one, length=2, batch=2, tp_rank=0, tp_size=1).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("mask_BS", [None, torch.zeros(2, 4, dtype=torch.bool)])
def test_several_modalities_need_ids(mask_BS: torch.Tensor | None) -> None:
    with refused(ConfigError):
        groups_of_rank(mask_BS, GROUP_OF_MODALITY, length=4, batch=2, tp_rank=0, tp_size=1)


def test_ids_of_another_shape_are_refused() -> None:
    with refused(ConfigError, "batch"):
        groups_of_rank(IDS_BS, GROUP_OF_MODALITY, length=3, batch=2, tp_rank=0, tp_size=2)


@pytest.mark.parametrize("wrong", [-2, -100, 3])
def test_an_id_of_no_modality_is_refused(wrong: int) -> None:
    ids_BS = IDS_BS.clone()
    ids_BS[1, 2] = wrong
    with refused(ConfigError, f"padding_mask: modality ids from {min(wrong, -1)} to {max(wrong, 2)} must be in [0, 3)"):
        groups_of_rank(ids_BS, GROUP_OF_MODALITY, length=4, batch=2, tp_rank=0, tp_size=1)
