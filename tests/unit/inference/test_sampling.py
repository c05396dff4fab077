"""Temperature, nucleus and draws give the same results as loops over sorted lists."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.errors import ConfigError
from moe_dist.inference.generate import Sampling, UniformDraws, draw, guided, probabilities


def slow_probabilities(
    logits: list[float], allowed: list[bool], temperature: float, top_p: float
) -> tuple[list[float], bool]:
    """Computes one row's probabilities token by token. Also returns whether rounding can change the nucleus."""
    ids = [token for token in range(len(logits)) if allowed[token]]
    ids.sort(key=lambda token: (-logits[token], token))
    if temperature == 0:
        return [1.0 if token == ids[0] else 0.0 for token in range(len(logits))], False
    weights = {token: math.exp((logits[token] - logits[ids[0]]) / temperature) for token in ids}
    total = math.fsum(weights.values())
    kept, reached, close = [], 0.0, False
    for token in ids:
        close |= abs(reached - top_p) < 1e-9
        if reached >= top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    inside = math.fsum(weights[token] for token in kept)
    return [weights[token] / inside if token in kept else 0.0 for token in range(len(logits))], close


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(-6, 6), st.booleans()), min_size=7, max_size=7).filter(
            lambda row: any(allowed for _, allowed in row)
        ),
        min_size=1,
        max_size=4,
    ),
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.9, 1.0]),
)
def test_equals_the_slow_form(rows: list[list[tuple[int, bool]]], temperature: float, top_p: float) -> None:
    logits = torch.tensor([[float(value) for value, _ in row] for row in rows])
    allowed = torch.tensor([[each for _, each in row] for row in rows])
    got = probabilities(logits, allowed, Sampling(temperature, top_p))
    assert got.dtype == torch.float64
    for row, found in zip(rows, got.tolist(), strict=True):
        expected, close = slow_probabilities([value for value, _ in row], [each for _, each in row], temperature, top_p)
        if not close:
            np.testing.assert_allclose(found, expected, atol=1e-12)
        assert all(chance == 0 for chance, (_, each) in zip(found, row, strict=True) if not each)


@given(chances=st.lists(st.integers(0, 5), min_size=5, max_size=5).filter(any), uniform=st.floats(0, 1, exclude_max=True))
def test_a_draw_is_where_the_running_sum_passes(chances: list[int], uniform: float) -> None:
    whole = sum(chances)
    token = int(draw(torch.tensor([chances], dtype=torch.float64) / whole, torch.tensor([uniform], dtype=torch.float64))[0])
    assert chances[token] > 0
    assert sum(chances[:token]) / whole <= uniform + 1e-12
    assert uniform <= sum(chances[: token + 1]) / whole + 1e-12


def test_a_sequence_draws_the_same_numbers_beside_any_others() -> None:
    alone, together, other = UniformDraws(3, [5]), UniformDraws(3, [4, 5, 6]), UniformDraws(4, [5])
    mine = torch.stack([alone() for _ in range(4)])[:, 0]
    assert torch.equal(mine, torch.stack([together() for _ in range(4)])[:, 1])
    assert not torch.equal(mine, torch.stack([other() for _ in range(4)])[:, 0])
    assert len(mine.unique()) == 4


def test_guidance_moves_along_the_difference() -> None:
    torch.manual_seed(0)
    logits, plain = torch.randn(2, 5), torch.randn(2, 5)
    for row in range(2):
        with_caption, without = logits[row].double().log_softmax(0), plain[row].double().log_softmax(0)
        for strength in (0.0, 1.0, 2.5):
            expected = without + strength * (with_caption - without)
            torch.testing.assert_close(guided(logits, plain, strength)[row], expected)
    assert torch.equal(guided(logits, plain, 0.0), plain.double().log_softmax(-1))


@pytest.mark.parametrize(("options", "field"), [((-1.0, 1.0), "temperature"), ((1.0, 0.0), "top_p"), ((1.0, 1.5), "top_p")])
def test_numbers_out_of_range_are_refused(options: tuple[float, float], field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}="):
        Sampling(*options)
