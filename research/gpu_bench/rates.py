"""Times kernels, matrix products, attention and layers with null experts on a GPU, against the least times that the GPU's
rates allow.

Shape letters: T tokens, Q = T K (token, expert) pairs, N (token, expert) pairs plus null choices, D hidden size, F hidden
width of experts, E experts, K choices of a token.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.utils
import torch.nn.functional as functional

from moe_dist.model.attention import attend, make_mask
from moe_dist.moe.experts.products import grouped_product, why_not_grouped
from moe_dist.moe.kernel_choice import why_not_triton
from moe_dist.moe.kernels.interface import RowIndex
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.layer import MoELayer
from research.gpu_bench.ceilings import BF16, drawn, seconds_of, sizes
from research.gpu_bench.profiled import profiled
from tools.gpu_check.layers import make_layer, passes, single_group, triton_or_none
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Reading

# T, D, F, E and K of other models. If E counts the experts of one rank, T counts the tokens that reach them.
SHAPES = {
    "Mixtral": (8192, 4096, 14336, 8, 2),
    "DeepSeek-V3, 32 of 256 experts": (16_384, 7168, 2048, 32, 2),
    "MoMa, a group": (16_384, 2048, 5440, 4, 1),
    "OLMoE, 32,768 tokens": (32_768, 2048, 1024, 64, 8),
}


def kernel_rates(job: CheckJob) -> list[Reading]:
    """Measures the rates of kernels. A rate counts the bytes that the kernel must read and write; a row counts as read
    once for each of its (token, expert) pairs."""
    if reason := why_not_triton(torch.device(job.device), torch.bfloat16):
        raise NotPossibleError(reason)
    from moe_dist.model.kernels.cross_entropy import cross_entropy, cross_entropy_backward
    from moe_dist.model.kernels.norm_rotary import norm_rotary, norm_rotary_backward
    from moe_dist.moe.kernels.choose import AMONG, choose, choose_backward
    from moe_dist.moe.kernels.rows import gather_rows, row_sum
    from moe_dist.moe.kernels.swiglu import swiglu, swiglu_backward

    copy, (T, D, F, E, K) = job.rate("copy"), sizes(job)
    Q, bf16 = T * K, torch.bfloat16
    row_Q = torch.randint(0, T, (Q,), device=job.device)
    table, pairs, gate, up = drawn(job, T, D), drawn(job, Q, D), drawn(job, Q, F), drawn(job, Q, F)
    weight, logits = torch.rand(Q, device=job.device), drawn(job, T, E, dtype=torch.float32)
    order, first = RowIndex((row_Q,), T).items_of_rows
    groups, column = (
        torch.zeros(T, dtype=torch.int64, device=job.device),
        torch.zeros(E, dtype=torch.int64, device=job.device),
    )
    top_k, among = torch.tensor([K, 0], device=job.device), AMONG["true_chosen"]
    chosen = choose(logits, groups, column, top_k, None, E, K, 1.0, among)[0]
    prob, square = torch.rand(E, device=job.device), torch.rand(1, device=job.device)
    measured: dict[str, tuple[Callable[[], Any], float, float]] = {
        "gather_rows": (lambda: gather_rows(table, row_Q, bf16), BF16 * 2 * Q * D, 0.8),
        "row_sum": (lambda: row_sum(pairs, pairs[:0], None, order, first, False, bf16), BF16 * (Q + T) * D, 0.7),
        "swiglu": (lambda: swiglu(weight, gate, up), BF16 * 3 * Q * F, 0.7),
        "swiglu_backward": (lambda: swiglu_backward(gate, weight, gate, up), BF16 * 5 * Q * F, 0.7),
        "choose": (lambda: choose(logits, groups, column, top_k, None, E, K, 1.0, among), 4 * T * E + 28 * Q, 0.0),
        "choose_backward": (
            lambda: choose_backward(logits, groups, column, top_k, chosen, weight.view(T, K), prob, square, E, 1.0, among),
            8 * T * E + 12 * Q,
            0.0,
        ),
    }
    V, heads = (64, 2) if job.rehearse else (50304, 16)
    norm_D, words, labels = torch.rand(D, device=job.device), drawn(job, T, V), row_Q[:T] % V
    x, tables = table.view(T, heads, D // heads), [torch.rand(T, D // heads // 2, device=job.device) for _ in range(2)]
    loss, log_z = cross_entropy(words, labels)
    half, row, none = BF16 * T * D, table[:, None], (None, None, 1e-5)
    measured |= {
        "norm": (lambda: norm_rotary(row, norm_D, *none, False, False, False), 2 * half, 0.7),
        "norm, for the router": (lambda: norm_rotary(row, norm_D, *none, False, False, True), 4 * half, 0.7),
        "norm, backward": (lambda: norm_rotary_backward(row, None, row, norm_D, *none, False), 3 * half, 0.7),
        "rotate": (lambda: norm_rotary(x, None, *tables, 0.0, False, False, False), 2 * half, 0.7),
        "normed rotary": (lambda: norm_rotary(x, norm_D, *tables, 1e-5, False, False, False), 2 * half, 0.7),
        "normed rotary, backward": (
            lambda: norm_rotary_backward(x, None, x, norm_D, *tables, 1e-5, False),
            3 * half,
            0.7,
        ),
        "cross_entropy": (lambda: cross_entropy(words, labels), BF16 * T * V, 0.7),
        "cross_entropy_backward": (lambda: cross_entropy_backward(words, labels, log_z, loss), 2 * BF16 * T * V, 0.7),
    }
    readings = []
    for name, (run, num_bytes, least) in measured.items():
        seconds = seconds_of(job, run)
        readings.append(job.timed(f"{name}: rate / copy rate", num_bytes / copy / seconds, least=least))
    return readings


def grouped(job: CheckJob) -> list[Reading]:
    """Divides the FLOP/s of the grouped matrix product of 8 experts by the FLOP/s of a dense matrix product."""
    gemm, (_, D, F, _, _), device, experts = job.rate("gemm"), sizes(job), torch.device(job.device), 8
    if reason := why_not_grouped(torch.bfloat16, device, (D, F)):
        raise NotPossibleError(reason)
    readings, stack = [], drawn(job, experts, F, D)
    for rows in (8,) if job.rehearse else (128, 1024, 8192):
        x, product = drawn(job, rows * experts, D), grouped_product([rows] * experts, device)
        seconds = seconds_of(job, lambda x=x, product=product: product(x, stack))
        share = 2 * rows * experts * D * F / seconds / gemm
        what = f"{rows} rows of each of {experts} experts: rate / dense rate"
        readings.append(job.timed(what, share, least=0.75 if rows >= 1024 else 0.0))
    return readings


def null_fraction(job: CheckJob) -> list[Reading]:
    """Measures the milliseconds of forward and backward with 8 true experts, at null fractions from 0 to about 0.9."""
    T, D, F, _, K = sizes(job)
    device, experts = torch.device(job.device), 8
    torch.manual_seed(0)
    x_TD, group_T = drawn(job, T, D), torch.zeros(T, dtype=torch.int64, device=device)
    readings, seconds = [], {}
    for fraction in (0.0, 0.25, 0.5, 0.75, 0.9):
        null = round(experts * fraction / (1 - fraction))
        made = bf16_layer(D, single_group(experts, null, K, F), device)
        with torch.no_grad():
            taken = float((made.router(x_TD, group_T)[0].expert_N >= 0).float().mean())
        seconds[fraction] = seconds_of(job, lambda made=made: passes(made, x_TD, group_T, x_TD))
        readings.append(job.timed(f"null fraction {1 - taken:.2f}", seconds[fraction] * 1e3, "ms"))
    return [*readings, job.timed("seconds at 0.9 / at 0", seconds[0.9] / seconds[0.0], most=0.5)]


def attention_rate(job: CheckJob) -> list[Reading]:
    """Measures the rate of attention inside packed documents, divided by the rate of torch's causal attention, in
    forward and backward. Both rates count the scores of a whole sequence. For several lengths, also counts compiled
    graphs, and warnings about attention that was not compiled."""
    device, heads, width = torch.device(job.device), 2 if job.rehearse else 16, 16 if job.rehearse else 128
    lengths = (8, 16) if job.rehearse else (4096, 2048, 1024, 512)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seconds = [_attention_seconds(job, device, heads, length, width) for length in lengths]
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled
    uncompiled = sum("without torch.compile" in str(each.message) for each in caught)
    return [
        *(
            job.timed(f"{each} positions: rate / causal", b / a, least=0.6 if each >= 2048 else 0.0)
            for each, (a, b) in zip(lengths, seconds, strict=True)
        ),
        Reading("graphs compiled for a length", made / len(lengths), most=2.0),
        Reading("warnings of uncompiled attention", uncompiled, most=0.0),
    ]


def _attention_seconds(job: CheckJob, device: torch.device, heads: int, length: int, width: int) -> tuple[float, float]:
    """Returns the seconds of attention inside one document, and of causal attention without documents."""
    q, k, v = (drawn(job, 2, heads, length, width).requires_grad_() for _ in range(3))
    direction = drawn(job, 2, heads, length, width)
    mask = make_mask(torch.zeros(2, length, dtype=torch.int32, device=device))
    runs = (lambda: attend(q, k, v, mask), lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    inside, causal = (seconds_of(job, lambda run=run: torch.autograd.grad(run(), (q, k, v), direction)) for run in runs)
    return inside, causal


def layer_rate(job: CheckJob) -> list[Reading]:
    """Times forward and backward of one layer on one rank, in the shapes of four models. The least time has two parts:
    the time of the matrix products at the rate of dense products, and the time of reading and writing the bytes of
    gathers, SwiGLU and sums at the rate of copies.
    """
    gemm, copy, device, readings = job.rate("gemm"), job.rate("copy"), torch.device(job.device), []
    for name, (T, D, F, E, K) in {"OLMoE": sizes(job), **({} if job.rehearse else SHAPES)}.items():
        ours, Q = bf16_layer(D, single_group(E, 0, K, F), device), T * K
        x_TD, group_T = drawn(job, T, D), torch.zeros(T, dtype=torch.int64, device=device)
        pairs = ours.router(x_TD, group_T)[0]

        def run(ours: MoELayer = ours, x_TD: torch.Tensor = x_TD, group_T: torch.Tensor = group_T) -> Any:
            return passes(ours, x_TD, group_T, x_TD)

        router = seconds_of(job, lambda ours=ours, x_TD=x_TD, group_T=group_T: ours.router(x_TD, group_T))
        plan = seconds_of(job, lambda ours=ours, pairs=pairs, T=T: ours.dispatcher.plan(pairs, T))
        seconds = seconds_of(job, run)
        forward = D * (T + Q) + 3 * Q * F + D * (Q + T)  # elements read and written by gather, SwiGLU and sum
        backward = D * (T + Q) + 5 * Q * F + D * (2 * Q + T)  # the sum also reads the rows of the gradients of gate and up
        flops = 3 * 3 * 2 * Q * D * F  # gate, up, down: 1 product in forward, 2 in backward
        least = flops / gemm + BF16 * (forward + backward) / copy
        readings += [
            job.timed(f"{name}: router", router * 1e3, "ms"),
            job.timed(f"{name}: plan", plan * 1e3, "ms"),
            Reading(f"{name}: kernels of forward and backward", profiled(job, run).launches),
            job.timed(f"{name}: forward and backward", seconds * 1e3, "ms"),
            job.timed(f"{name}: its least time", least * 1e3, "ms"),
            job.timed(f"{name}: seconds / least", seconds / least, most=1.25),
        ]
    return readings


def bf16_layer(hidden: int, groups: Any, device: torch.device) -> MoELayer:
    """Makes a layer with bf16 experts, like a training step that keeps bf16 copies of the weights."""
    made = make_layer(hidden, groups, kernels=triton_or_none(device, torch.bfloat16) or TORCH, made_on=device)
    made.experts.to(torch.bfloat16)
    return made
