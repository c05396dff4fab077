"""transformers has a name for every scaling of rotary frequencies. Dynamic scaling counts a sequence's length without
padding."""

import pytest
import torch

from moe_dist.config.rope.base import RopeScalingSection
from moe_dist.hf.attention_fields import ROPE_SCALINGS as SECTIONS
from moe_dist.model.layers import ModelArgs
from moe_dist.model.rope import DynamicScaling, frequencies
from moe_dist.model.transformer import Transformer

WIDTH, BASE = 16, 1e4
POSITIONS = torch.arange(24)[None]


def test_every_kind_has_a_place_in_transformers() -> None:
    assert set(SECTIONS.values()) == set(RopeScalingSection.__subclasses__())


def test_dynamic_counts_no_padding() -> None:
    """Dynamic scaling does not count padding: neither after the documents of a training sequence, nor after a short prompt
    in a batch."""
    sizes = {"vocab_size": 9, "hidden_dim": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": WIDTH}
    args = ModelArgs(**sizes, moe_layers=(), dense_ffn_dim=8, rope_scaling=DynamicScaling(2.0, 8))
    model = Transformer(args, make_moe=lambda _: pytest.fail("no layer has experts")).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    tokens = torch.randint(9, (1, 24), generator=generator)
    short, zeros = tokens[:, :6], torch.zeros(1, 6, dtype=torch.int64)
    padding = (POSITIONS >= 6).to(torch.int64)
    with torch.no_grad():
        alone, _ = model(short, POSITIONS[:, :6], zeros, zeros)
        restarted = torch.cat([POSITIONS[:, :6], POSITIONS[:, :18]], dim=1)
        in_sequence, _ = model(tokens, restarted, padding, -padding)
        in_batch = model.forward_cached(tokens, POSITIONS, -padding, model.make_cache(1, 24))
    torch.testing.assert_close(in_sequence[:, :6], alone)
    torch.testing.assert_close(in_batch[:, :6], alone)


def test_dynamic_counts_each_sequences_own_length() -> None:
    positions = torch.stack([torch.arange(24), torch.arange(24) % 8])
    rates, _ = DynamicScaling(2.0, 8)(WIDTH, BASE, positions)
    base = BASE * (2 * 24 / 8 - 1) ** (WIDTH / (WIDTH - 2))
    torch.testing.assert_close(rates[0, 0, 0], torch.tensor([base ** (-2 * i / WIDTH) for i in range(WIDTH // 2)]))
    # documents of 8 tokens do not exceed the trained length
    assert torch.equal(rates[1, 0, 0], frequencies(WIDTH, BASE, positions))
