"""The loss that is computed in tiles of words and tokens equals the loss from all logits, and needs less memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from moe_dist.data.batch import IGNORED
from moe_dist.model import token_loss
from moe_dist.model.layers import token_losses
from moe_dist.model.token_loss import tiled_token_losses

SEQUENCES, LENGTH, DIM, VOCABULARY = 3, 7, 5, 37
GB = 1e9


def inputs(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns hidden states, output weight, labels (some ignored), and gradients of the losses."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SEQUENCES, LENGTH, DIM, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    labels[0], labels[1, 2:4] = IGNORED, IGNORED
    labels[2, :2] = torch.tensor([0, VOCABULARY - 1])
    gradient = torch.randn(SEQUENCES, LENGTH, generator=generator, dtype=torch.float64)
    weight = weight.to(weight_dtype or dtype).requires_grad_()
    return x.to(dtype).requires_grad_(), weight, labels, gradient.to(torch.promote_types(dtype, torch.float32))


def plain(x: Tensor, weight: Tensor, labels: Tensor, _: int) -> Tensor:
    return token_losses(torch.nn.functional.linear(x, weight.to(x.dtype)), labels)


def with_gradients(function: Any, words: int, *dtypes: torch.dtype) -> list[Tensor]:
    x, weight, labels, gradient = inputs(*dtypes)
    losses = function(x, weight, labels, words)
    losses.backward(gradient)
    return [losses.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("words", [1, 8, VOCABULARY - 1, VOCABULARY, 100])
@pytest.mark.parametrize("tile_tokens", [1, 3, 4096])
def test_values_and_gradients_are_those_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, tile_tokens: int, words: int
) -> None:
    monkeypatch.setattr(token_loss, "TILE_TOKENS", tile_tokens)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        for got, expected in zip(
            with_gradients(tiled_token_losses, words, dtype), with_gradients(plain, words, dtype), strict=True
        ):
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bf16_stays_near_the_exact_gradients(monkeypatch: pytest.MonkeyPatch, weight_dtype: torch.dtype) -> None:
    """Sums over tiles are in fp32. If they were in bf16, the weight's gradient would have twice the error of a single
    product."""
    monkeypatch.setattr(token_loss, "TILE_TOKENS", 1)
    x, weight, labels, gradient = (each.detach() for each in inputs(torch.bfloat16, weight_dtype))
    x, weight = x.double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    losses = plain(x, weight, labels, 0)
    losses.backward(gradient.double())
    exact = [losses.detach(), x.grad, weight.grad]
    errors = [
        [(each.double() - value).norm() for each, value in zip(got, exact, strict=True)]  # pyright: ignore
        for got in (with_gradients(how, 4, torch.bfloat16, weight_dtype) for how in (tiled_token_losses, plain))
    ]
    for tiled, whole in zip(*errors, strict=True):
        assert tiled <= 1.5 * whole


def test_a_frozen_weight_gets_no_gradient_and_no_labels_give_zeros() -> None:
    x, weight, labels, gradient = inputs(torch.float32)
    tiled_token_losses(x, weight.requires_grad_(False), labels, 8).backward(gradient)
    assert weight.grad is None
    ignored = torch.full_like(labels, IGNORED)
    x.grad = None
    losses = tiled_token_losses(x, weight.requires_grad_(), ignored, 8)
    losses.backward(gradient)
    for each in (losses, x.grad, weight.grad):
        assert not each.any()
    empty = tiled_token_losses(x[:0], weight, labels[:0], 8)
    assert empty.shape == (0, LENGTH)
    empty.sum().backward()


def test_a_sequence_has_the_same_bits_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 33, 64, generator=generator).requires_grad_()
    weight, labels = torch.randn(500, 64, generator=generator), torch.randint(500, (8, 33), generator=generator)
    together = tiled_token_losses(x, weight, labels, 96)
    together.sum().backward()
    for sequence in range(8):
        alone = x.detach()[sequence : sequence + 1].clone().requires_grad_()
        losses = tiled_token_losses(alone, weight, labels[sequence : sequence + 1], 96)
        losses.sum().backward()
        assert torch.equal(losses[0], together[sequence])
        assert torch.equal(alone.grad[0], x.grad[sequence])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that operations have made. With fake tensors these are all allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Any = WeakIdKeyDictionary()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self.sizes[each.untyped_storage()] = each.untyped_storage().nbytes()
        self.most = max(self.most, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize(("function", "least", "most"), [(plain, 6.2, 9.0), (tiled_token_losses, 0.2, 0.7)])
def test_loss_memory_of_a_large_vocabulary(function: Any, least: float, most: float) -> None:
    """Bounds the peak memory for 151,936 words x 4,096 tokens in bf16, without hidden states, weight and their
    gradients."""
    tokens, vocabulary, dim = 4096, 151_936, 512
    with FakeTensorMode():
        x = torch.empty(1, tokens, dim, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocabulary, dim, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(1, tokens, dtype=torch.int64)
        with LiveBytes() as live:
            function(x, weight, labels, 8192).sum().backward()
    gradients = 2 * dim * (tokens + vocabulary)
    assert least < (live.most - gradients) / GB < most
