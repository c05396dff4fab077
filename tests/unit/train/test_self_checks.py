"""Faults of batches, gradients, moments and parameters are named, and right ones are not."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from transformers import Qwen3MoeConfig

from moe_dist.data.batch import IGNORED, Batch, whole_documents
from moe_dist.train.loop.self_checks import (
    batch_problems,
    contaminated,
    dropout,
    empty_moments,
    frozen_weights,
    kept_gradients,
    random_states,
)


def batch() -> Batch:
    """Returns a batch of two rows of 80 random tokens, with 20 positions of padding in the last."""
    tokens_BS = torch.randint(0, 50, (2, 80), generator=torch.Generator().manual_seed(0))
    padding_BS = torch.zeros(2, 80, dtype=torch.bool)
    padding_BS[1, 60:] = True
    labels_BS = tokens_BS.roll(-1, 1).masked_fill(padding_BS | padding_BS.roll(-1, 1), IGNORED)
    zeros_BS = torch.zeros_like(tokens_BS)
    return Batch(tokens_BS, labels_BS, zeros_BS, zeros_BS.int(), zeros_BS, zeros_BS, padding_BS, padding_BS)


def test_labels_that_are_not_shifted_or_stand_at_padding_are_named() -> None:
    right = batch()
    assert list(batch_problems([right])) == []
    copied = replace(right, labels_BS=right.tokens_BS.masked_fill(right.padding_BS, IGNORED))
    assert [kind for kind, _ in batch_problems([copied])] == ["labels"]
    padded = replace(right, labels_BS=torch.where(right.padding_BS, 0, right.labels_BS))
    assert [kind for kind, _ in batch_problems([padded])] == ["padding"]


def test_gradients_moments_and_frozen_matrices_are_named() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    assert not [*kept_gradients(model.parameters()), *empty_moments(optimizer.state.items()), *frozen_weights([model])]
    model(torch.ones(1, 3)).sum().backward()
    assert [kind for kind, _ in kept_gradients(model.parameters())] == ["gradients"]
    optimizer.step()
    assert list(empty_moments(optimizer.state.items())) == []
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    assert [kind for kind, _ in empty_moments(optimizer.state.items())] == ["moments"]
    model.weight.requires_grad_(False)
    (problem,) = frozen_weights([model])
    assert problem[1].startswith("weight: frozen")


def test_held_out_documents_that_training_reads_are_named() -> None:
    """Each row has 4 documents of 20 tokens. The last document of the second row is padding."""
    draws = torch.Generator().manual_seed(1)
    new = replace(batch(), documents_BS=torch.arange(80).expand(2, 80) // 20)
    held = [replace(new, tokens_BS=torch.randint(0, 50, (2, 80), generator=draws)) for _ in range(2)]
    assert len(whole_documents(held)) == 14
    assert not whole_documents(held) & whole_documents([new])
    moved = replace(held[1], tokens_BS=held[1].tokens_BS.roll(20, 1))  # the document that ends the row became padding
    assert len(whole_documents(held[1:]) & whole_documents([moved])) == 6
    assert list(contaminated(9, 14)) == [], "they may be there by chance"
    ((kind, text),) = contaminated(10, 14)
    assert kind == "contaminated"
    assert text.startswith("training has read 10 of the 14 held-out documents that rank 0 evaluates")


def test_random_numbers_that_no_field_asks_for_are_named() -> None:
    before, config = random_states(), Qwen3MoeConfig(attention_dropout=0.1)
    torch.rand(1, generator=torch.Generator())
    assert list(dropout(before, None)) == [], "a generator of its own"
    torch.nn.Dropout(0.1)(torch.ones(1))
    assert [kind for kind, _ in dropout(before, None)] == ["dropout"]
    assert [kind for kind, _ in dropout(before, SimpleNamespace(config=Qwen3MoeConfig()))] == ["dropout"]
    assert list(dropout(before, SimpleNamespace(config=config))) == []
