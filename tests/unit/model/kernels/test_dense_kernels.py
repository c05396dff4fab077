"""In Triton's interpreter the kernels of dense parts give the same values and gradients as torch in float64.

The kernels' block sizes do not divide the numbers of heads, the widths and the number of words.
"""

from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.data.batch import IGNORED
from moe_dist.model.kernels import norm_rotary
from moe_dist.model.kernels.choice import use, why_not
from moe_dist.model.kernels.interface import TORCH, DenseKernels
from moe_dist.model.kernels.triton_kernels import TRITON
from moe_dist.model.layers import Projection, RMSNorm, RopePairs, rotary_table
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.policies import expert_groups
from moe_dist.train.build.training import build_model
from tests.support.cover import full, full_unless
from tests.unit.plan.test_memory import config as small_config

CPU = torch.device("cpu")
HEADS = {  # (sequences, heads, positions, head width, rotated width)
    "whole": (2, 16, 5, 64, 64),
    "odd numbers": (2, 3, 7, 20, 12),
    "several programs for a token": (1, 37, 2, 128, 128),
    "one pair": (1, 1, 1, 2, 2),
    "empty": (0, 2, 3, 8, 8),
}
# When it stores bf16, the interpreter truncates, but a GPU rounds. Results may therefore differ by two units in the
# last place.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6}


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, float(exact.detach().abs().max())) if exact.numel() else 1.0
    torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("pairs", ["halves", "adjacent"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", HEADS)
def test_rotary_embedding(shape: str, dtype: torch.dtype, pairs: RopePairs) -> None:
    batch, heads, length, width, turning = HEADS[shape]
    torch.manual_seed(0)
    x = torch.randn(batch, length, heads, width).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    table = rotary_table(torch.randint(0, 4096, (batch, length)), turning, 1e4)
    ours = TRITON.rotate(x.transpose(1, 2), table, pairs)
    theirs = TORCH.rotate(exact.transpose(1, 2), tuple(each.double() for each in table), pairs)
    close(ours, theirs, dtype)
    assert ours.dtype == dtype
    assert ours.transpose(1, 2).is_contiguous(), "attention would copy its output"
    direction = torch.randn_like(theirs)
    for got, wanted in zip(
        torch.autograd.grad(ours, x, direction.to(dtype)),
        torch.autograd.grad(theirs, exact, direction.to(dtype).double()),
        strict=True,
    ):
        close(got, wanted, dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "whole", "pairs"),
    full_unless(
        lambda shape, dtype, whole, pairs: (
            (shape == (1, 11, 2, 6) and dtype == torch.float32)
            or (dtype, whole, pairs) == (torch.bfloat16, True, "adjacent")
        ),
        product(
            [(2, 5, 16, 64), (2, 7, 3, 20), (1, 1, 1, 2), (0, 3, 2, 8), (1, 11, 2, 6)],
            TOLERANCE,
            [False, True],
            ["halves", "adjacent"],
        ),
    ),
)
def test_norm_with_rotary_embedding(
    shape: tuple[int, ...], dtype: torch.dtype, whole: bool, pairs: RopePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_rotary, "PROGRAMS", 4)  # fewer programs than tokens; the last program gets fewer tokens
    batch, length, heads, width = shape
    torch.manual_seed(0)
    x, weight = (
        torch.randn(shape).to(dtype).requires_grad_(),
        torch.randn(heads * width if whole else width).requires_grad_(),
    )
    exact, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    table = rotary_table(torch.randint(0, 4096, (batch, length)), width, 1e4)
    ours = TRITON.norm_and_rotate(x, weight, 1e-5, table, pairs)
    normed = TORCH.rms_norm(exact.flatten(2).unflatten(-1, (-1, len(weight))), exact_weight, 1e-5).view(shape)
    theirs = TORCH.rotate(normed.transpose(1, 2), tuple(each.double() for each in table), pairs)
    close(ours, theirs, dtype)
    assert ours.transpose(1, 2).is_contiguous()
    direction = torch.randn_like(theirs).to(dtype)
    gradients = torch.autograd.grad(ours, [x, weight], direction)
    expected = torch.autograd.grad(theirs, [exact, exact_weight], direction.double())
    close(gradients[0], expected[0], dtype)
    close(gradients[1], expected[1], torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "words"), [((2, 5), 37), ((1, 3), 4096), ((1, 3), 9001), ((1, 1), 1), ((0, 4), 8)])
def test_losses_of_tokens(shape: tuple[int, int], words: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(*shape, words)).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    labels = torch.randint(0, words, shape)
    labels.view(-1)[1:2] = IGNORED
    labels.view(-1)[2:3] = words - 1
    ours, theirs = TRITON.token_losses(logits, labels), TORCH.token_losses(exact, labels)
    assert ours.dtype == torch.float32
    close(ours, theirs, torch.float32)
    direction = torch.randn_like(theirs)
    gradient, expected = (
        torch.autograd.grad(ours, logits, direction.float())[0],
        torch.autograd.grad(theirs, exact, direction)[0],
    )
    assert gradient.dtype == dtype
    close(gradient, expected, dtype)
    TRITON.token_losses(logits, labels).sum().backward()  # sum() gives a gradient with stride 0
    assert not logits.grad.view(-1, words)[1:2].any()


def test_a_label_above_the_vocabulary_has_no_loss() -> None:
    """A label outside the vocabulary gives nan as loss and gradient. The kernel reads no logit out of bounds."""
    logits = torch.randn(1, 3, 5, requires_grad=True)
    losses = TRITON.token_losses(logits, torch.tensor([[4, 5, 2**40]]))
    losses.sum().backward()
    for found in (losses[..., None], logits.grad):
        assert found[0, 0].isfinite().all()
        assert found[0, 1:].isnan().all()


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[1e4, -1e4, 9.999e3], [-3e38, -3e38, -3e38]]])
    labels = torch.tensor([[2, 0]])
    torch.testing.assert_close(TRITON.token_losses(logits, labels), TORCH.token_losses(logits, labels))


@pytest.mark.parametrize("masked", [slice(0, 4096), slice(4096, 5000), slice(0, 4999)])
def test_excluded_words_have_no_share_of_the_loss(masked: slice) -> None:
    """Whole blocks of logits may be -inf."""
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 2, 5000), torch.full((1, 2), IGNORED)
    logits[..., masked] = float("-inf")
    labels[0, 0] = 4999 if masked.start == 0 else 7
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    for kernels, x in ((TRITON, ours), (TORCH, theirs)):
        kernels.token_losses(x, labels).sum().backward()
    torch.testing.assert_close(TRITON.token_losses(logits, labels), TORCH.token_losses(logits, labels))
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 3, 100), (5, 6), (1, 1, 2), (3, 2056), (2, 9, 3, 24), (0, 4, 8), (70, 700)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some shapes have more rows than programs, so that the last program has fewer rows."""
    monkeypatch.setattr(norm_rotary, "PROGRAMS", 4)
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape[-1]).requires_grad_()
    exact = [each.detach().double().requires_grad_() for each in (x, weight)]
    ours, theirs = TRITON.rms_norm(x, weight, 1e-5), TORCH.rms_norm(exact[0], exact[1], 1e-5)
    close(ours, theirs, dtype)
    direction = torch.randn_like(theirs).to(dtype)
    gradients = torch.autograd.grad(ours, [x, weight], direction)
    expected = torch.autograd.grad(theirs, exact, direction.double())
    assert [each.dtype for each in gradients] == [dtype, torch.float32]
    close(gradients[0], expected[0], dtype)
    close(gradients[1], expected[1], torch.float32)


@pytest.mark.parametrize("width", [7, norm_rotary.LARGEST + 2])
def test_norms_without_a_kernel_take_torch(width: int) -> None:
    x, weight = torch.randn(3, width), torch.randn(width)
    assert torch.equal(TRITON.rms_norm(x, weight, 1e-5), TORCH.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norm_for_experts_and_router(dtype: torch.dtype) -> None:
    """The router gets the experts' input in fp32. The sum of the router's and the experts' gradients is not rounded."""
    torch.manual_seed(0)
    x, weight = torch.randn(6, 40).to(dtype).requires_grad_(), torch.randn(40).requires_grad_()
    exact = [each.detach().double().requires_grad_() for each in (x, weight)]
    ours, theirs = TRITON.norm_for_router(x, weight, 1e-5), TORCH.norm_for_router(exact[0], exact[1], 1e-5)
    assert [each.dtype for each in ours] == [dtype, torch.float32]
    assert torch.equal(ours[0].float(), ours[1])
    close(ours[0], theirs[0], dtype)
    directions = [torch.randn(6, 40).to(each.dtype) for each in ours]
    gradients = torch.autograd.grad(ours, [x, weight], directions)
    expected = torch.autograd.grad(theirs, exact, [each.double() for each in directions])
    close(gradients[0], expected[0], dtype)
    close(gradients[1], expected[1], torch.float32)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_several_projections(dtype: torch.dtype, bias: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10).to(dtype).requires_grad_()
    ours = [RMSNorm(10, 1e-5), *(Projection(10, width, bias=bias) for width in (10, 7, 1))]
    for parameter in (parameter for each in ours for parameter in each.parameters()):
        torch.nn.init.normal_(parameter)
    ours[2].weight.requires_grad_(not frozen)
    exact_x, exact = x.detach().double().requires_grad_(), [deepcopy(each).double() for each in ours]
    found, wanted = TRITON.project(x, *ours), TORCH.project(exact_x, *exact)
    for y in (found, wanted):
        torch.autograd.backward(y, [torch.cos(torch.arange(each.numel())).view_as(each).to(each) for each in y])
    gradients = [(one.weight.grad, other.weight.grad) for one, other in zip(ours, exact, strict=True)]
    assert (gradients[2][0] is None) == frozen
    for got, expected in [*zip(found, wanted, strict=True), (x.grad, exact_x.grad), *gradients]:
        if expected is not None:
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=16 * TOLERANCE[dtype])


# A trial takes 7 s. The tests above compare each kernel with torch, and tests/unit/moe/kernels/test_trial.py runs a trial.
@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_good_kernels_pass_the_trial(dtype: torch.dtype) -> None:
    assert why_not(TRITON, CPU, dtype) is None


def late_angles(x: Tensor, table: Any, *pairs: Any) -> Tensor:
    return TRITON.rotate(x, tuple(each.roll(1, 2) for each in table), *pairs)


def weight_forgotten(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return TRITON.rms_norm(x, torch.ones_like(weight), eps)


def router_weight_forgotten(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return TRITON.norm_for_router(x, torch.ones_like(weight), eps)


def weight_reversed(x: Tensor, weight: Tensor, *rest: Any) -> Tensor | None:
    return TRITON.norm_and_rotate(x, weight.flip(0), *rest)


def first_block_alone(logits: Tensor, labels: Tensor) -> Tensor:
    return TRITON.token_losses(logits[..., :4096], labels.clamp(max=4095))


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        full(
            TRITON._replace(norm_for_router=router_weight_forgotten),
            "the norm for the router of the Triton kernels differs",
        ),
        full(
            TRITON._replace(norm_and_rotate=weight_reversed), "the norm of all heads, rotated of the Triton kernels differs"
        ),
        full(DenseKernels(late_angles, TRITON.token_losses), "the rotated halves of the Triton kernels differs"),
        full(TRITON._replace(rms_norm=weight_forgotten), "the norm of the Triton kernels differs"),
        full(DenseKernels(TRITON.rotate, first_block_alone), "the losses of tokens of the Triton kernels differs"),
    ],
)
def test_the_trial_names_a_fault(kernels: DenseKernels, words: str) -> None:
    assert words in str(why_not(kernels, CPU, torch.float32))


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({"qk_norm": "full"}, {"project", "norm_and_rotate"}),
        full({"qk_norm": "head", "rope_pairs": "adjacent"}, {"project", "norm_and_rotate"}),
        full({"rope_dim": 8, "attention_bias": "qkv"}, {"project", "rotate"}),
        full(
            {
                "attention": {"kind": "latent", "q_rank": 24, "kv_rank": 16, "value_dim": 12},
                "num_kv_heads": 4,
                "rope_dim": 8,
            },
            {"rotate"},
        ),
    ],
)
def test_a_model_uses_them_all(changes: dict[str, Any], used: set[str]) -> None:
    """With the kernels a transformer has the same losses and gradients as with torch's operations."""
    cfg, results, called = small_config(**changes), [], set()
    placement = ExpertPlacement.interleaved(expert_groups(cfg.model.moe), 1)
    tokens = torch.arange(8).view(2, 4) * 7 % 100
    for kernels in (TORCH, TRITON):
        called.clear()
        torch.manual_seed(0)
        model = build_model(cfg, placement, ep_rank=0, ep_group=None)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        watched = DenseKernels(*(partial(noted, called, name, each) for name, each in kernels._asdict().items()))
        use(model, watched)
        positions = torch.arange(4).expand(2, 4)
        losses, _ = model(tokens, positions, torch.zeros_like(tokens), torch.zeros_like(tokens), labels_BS=tokens)
        losses.sum().backward()
        results.append([losses, *(each.grad for each in model.parameters())])
    assert called == {"rms_norm", "norm_for_router", "token_losses", *used}
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))


def noted(called: set[str], name: str, function: Any, *args: Any) -> Any:
    called.add(name)
    return function(*args)
