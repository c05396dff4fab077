"""A capacity drops the same pairs as the oracle, which serves pairs one by one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.moe.routers.capacity import capacity_of, over_capacity
from tests.reference.layer import kept_pairs


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 40), st.integers(1, 5), st.sampled_from(["probability", "position"]), st.integers(0, 10_000))
def test_equals_the_oracle(num_tokens: int, num_experts: int, drop: str, seed: int) -> None:
    """Many pairs tie, because there are only four different probabilities. On a tie the earlier token keeps its pair."""
    generator = torch.Generator().manual_seed(seed)
    top_k = min(2, num_experts)
    chosen_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    chosen_TK = chosen_TK.masked_fill(torch.rand(chosen_TK.shape, generator=generator) < 0.3, -1)
    score_TK = torch.randint(0, 4, chosen_TK.shape, generator=generator) / 4
    room = torch.randint(0, 8, (num_experts,), generator=generator)
    over = over_capacity(chosen_TK.flatten(), score_TK.flatten(), room, drop).view_as(chosen_TK)  # pyright: ignore
    pairs = [
        (token, int(expert), float(score))
        for token in range(num_tokens)
        for expert, score in zip(chosen_TK[token], score_TK[token], strict=True)
        if expert >= 0
    ]
    kept = kept_pairs(pairs, dict(enumerate(room.tolist())), drop)
    ours = {(int(t), int(chosen_TK[t, k])) for t, k in torch.argwhere(~over & (chosen_TK >= 0)).tolist()}
    assert ours == kept
    assert not over[chosen_TK < 0].any()


def test_room_is_rounded_up_but_not_for_the_last_bits() -> None:
    rooms = [(1.0, 10, 4, 3), (1.0, 12, 4, 3), (0.1, 30, 1, 3), (1.25, 0, 4, 0), (0.01, 1, 8, 1)]
    for factor, choices, columns, room in rooms:
        assert capacity_of(factor, torch.tensor(choices), torch.tensor(columns)).item() == room
