"""Rows under several placements equal a loop over tokens and choices."""

import numpy as np
import torch

from moe_dist.train.rank_balance.placement_rows import remote_rows


def test_rows_equal_a_loop_over_tokens() -> None:
    rng, ranks, home = np.random.default_rng(0), 5, 3  # rank 4 has no expert in the second placement
    rank_PE = np.stack([rng.integers(0, ranks, 7), rng.integers(0, ranks - 1, 7)])
    columns = rng.integers(-9, 12, (40, 4))  # from 7 on null experts; negative: no choice, or a dropped pair
    columns[:3] = -1
    wanted = [sum(len({rank_E[c] for c in row if 0 <= c < 7} - {home}) for row in columns.tolist()) for rank_E in rank_PE]
    rows_P = remote_rows(torch.from_numpy(columns).to(torch.int16), torch.from_numpy(rank_PE), ranks, home)
    assert rows_P.tolist() == wanted
    assert remote_rows(torch.zeros(0, 4, dtype=torch.int16), torch.from_numpy(rank_PE), ranks, home).tolist() == [0, 0]
