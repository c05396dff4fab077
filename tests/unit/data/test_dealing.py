"""Dealing gives each sequence to one rank, and evens out the ranks' costs on small cases and on a mix of texts and
pictures."""

import itertools

import numpy as np
import pytest

from moe_dist.data.dealing import SequenceCosts, deal, equal_parts

# (micro-batches, ranks, sequences per micro-batch and rank, ep)
SHAPES = [(1, 4, 8, 1), (2, 4, 4, 2), (8, 4, 1, 1), (4, 8, 2, 8), (3, 1, 5, 1)]


def mixed_costs(count: int, seed: int) -> np.ndarray:
    """Returns the costs of packed sequences of 4,096 tokens. A sequence has short texts, or pictures of 1,500 to 4,096
    tokens. A picture token uses about a third as many experts as a text token. For one token, attention to 2,000
    positions costs as much as the rest of the dense layers."""
    rng = np.random.default_rng(seed)
    costs = SequenceCosts(np.arange(4097.0) * (2000 + np.arange(4097.0)), np.array([1000.0, 300.0]))
    found = []
    for _ in range(count):
        picture, lengths = int(rng.random() < 0.3), []
        while sum(lengths) < 4096:
            length = int(rng.integers(1500, 4097) if picture else rng.integers(20, 300))
            lengths.append(min(4096 - sum(lengths), length))
        tokens_M = np.eye(2, dtype=np.int64)[picture] * 4096
        found.append(costs.of(lengths, tokens_M))
    return np.array(found)


def test_the_cost_of_a_sequence_by_hand() -> None:
    """Attention to a document costs the square of its length. The first case has documents of 2 and 1 tokens and one
    token of padding, which cost 4 + 1 + 1. Experts cost 10 per text token and 100 per picture token."""
    costs = SequenceCosts(np.arange(5.0) ** 2, np.array([10.0, 100.0]))
    assert costs.of([2, 1], np.array([2, 1])) == (6.0, 120.0)
    assert costs.of([4], np.array([0, 4])) == (16.0, 400.0)
    pictured = SequenceCosts(costs.document_S, costs.expert_M, patch=5.0, pair=0.5)
    assert pictured.of([4], np.array([0, 4]), [8, 2]) == (16.0 + 5 * 10 + 0.5 * (64 + 4), 400.0)


@pytest.mark.parametrize("seed", range(20))
def test_equal_parts_are_near_the_best(seed: int) -> None:
    """The larger half that `equal_parts` makes costs at most 2 % of the sum more than the larger half of the best split."""
    cost = np.random.default_rng(seed).random(8)
    best = min(
        max(cost[list(half)].sum(), cost.sum() - cost[list(half)].sum()) for half in itertools.combinations(range(8), 4)
    )
    assert cost[equal_parts(cost, 2)].sum(1).max() <= best + cost.sum() / 50


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_sequence_is_dealt_once(shape: tuple[int, int, int, int], mix: bool) -> None:
    micro, ranks, each, ep = shape
    cost_Q2 = mixed_costs(micro * ranks * each, 1)
    dealt = deal(cost_Q2, micro_batches=micro, ranks=ranks, ep=ep, mix=mix)
    assert dealt.place_IWB.shape == (micro, ranks, each)
    assert sorted(dealt.place_IWB.flatten().tolist()) == list(range(len(cost_Q2)))
    blocks = np.sort(dealt.place_IWB.reshape(micro, -1), axis=1)
    stay = np.array_equal(blocks, np.arange(len(cost_Q2)).reshape(micro, -1))
    assert stay or mix
    again = deal(cost_Q2, micro_batches=micro, ranks=ranks, ep=ep, mix=mix)
    assert np.array_equal(dealt.place_IWB, again.place_IWB)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("shape", "mix"),
    [((1, 8, 16, 1), False), ((4, 8, 8, 4), False), ((1, 8, 16, 8), False), ((16, 8, 1, 1), True), ((8, 8, 2, 8), True)],
    ids=str,
)
def test_short_texts_and_long_pictures_are_even_within_5_percent(
    shape: tuple[int, int, int, int], mix: bool, seed: int
) -> None:
    micro, ranks, each, ep = shape
    dealt = deal(mixed_costs(micro * ranks * each, seed), micro_batches=micro, ranks=ranks, ep=ep, mix=mix)
    assert dealt.dealt <= 1.05 < dealt.undealt


@pytest.mark.parametrize("micro_batches", [1, 8])
@pytest.mark.parametrize("seed", range(5))
def test_pictures_count_by_the_patches_of_their_encoder(seed: int, micro_batches: int) -> None:
    """Conversations of Qwen3-VL-30B-A3B, half of them with pictures of 256 to 8,192 patches, in sequences of 4,096 tokens
    on 8 ranks: a deal by tokens alone leaves ranks uneven."""
    layers, width, inner = 27, 1152, 4304
    encoder = {"patch": layers * 4 * width * (2 * width + inner), "pair": layers * 4 * width}
    token, key, experts = 48 * 2 * 19e6, 48 * 4 * 4096, np.array([48 * 8 * 9.4e6] * 2)
    whole = SequenceCosts(np.arange(4097.0) * (token + key * np.arange(4097.0)), experts, **encoder)
    rng, found, blind = np.random.default_rng(seed), [], []
    for _ in range(64):
        lengths, patches = list[int](), list[int]()
        while sum(lengths) < 3500:
            picture = int(4 * 4 ** rng.uniform(3, 5.5)) if rng.random() < 0.5 else 0
            lengths.append(min(4096 - sum(lengths), picture // 4 + int(rng.integers(50, 300))))
            patches += [4 * min(picture // 4, lengths[-1])] if picture else []
        parts = lengths, np.array([sum(lengths) - sum(patches) // 4, sum(patches) // 4])
        found.append(whole.of(*parts, patches))
        blind.append(whole.of(*parts))
    cost_Q2, options = np.array(found), {"micro_batches": micro_batches, "ranks": 8, "ep": 8, "mix": True}
    dealt, own_IW = deal(cost_Q2, **options), cost_Q2[deal(np.array(blind), **options).place_IWB].sum(2)
    cost_IW = own_IW[..., 0] + own_IW[..., 1].mean(1, keepdims=True)
    by_tokens = cost_IW.max(1).sum() / cost_IW.mean(1).sum()
    assert dealt.dealt - 1 < 0.7 * (by_tokens - 1) < 0.7 * (dealt.undealt - 1)


def test_an_even_order_stays() -> None:
    """With equal costs no distribution is better, so the sequences keep the order of the stream."""
    dealt = deal(np.ones((8, 2)), micro_batches=2, ranks=2, ep=1, mix=True)
    assert dealt.place_IWB.flatten().tolist() == list(range(8))
    assert dealt.dealt == dealt.undealt == 1.0


def test_experts_cost_their_ep_group() -> None:
    """With ep=2 the two ranks share the cost of all experts. Dealing can even out only the other costs: with 3, 2, 1
    and 2 for the four sequences, each rank gets 4."""
    cost_Q2 = np.array([[3.0, 0.0], [2.0, 9.0], [1.0, 0.0], [2.0, 0.0]])
    dealt = deal(cost_Q2, micro_batches=1, ranks=2, ep=2, mix=False)
    assert sorted(cost_Q2[dealt.place_IWB[0], 0].sum(1).tolist()) == [4.0, 4.0]
    assert (dealt.undealt, dealt.dealt) == (pytest.approx(9.5 / 8.5), 1.0)
