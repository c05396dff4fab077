"""Triton kernels for top-k routing. They compute choices, weights and sums from logits, and the gradient of the logits.

    p = softmax of the logits of the token's group,   z = log of the sum of their exponentials
    w = scale p of the chosen column, or scale times the softmax over the chosen columns

Each Triton program computes a block of tokens and writes the block's sums, so that nothing is added atomically. Shape
letters: T tokens, C columns (true experts first, the others null), K choices, G expert groups, B blocks of tokens.
"""

# Triton's type annotations do not describe kernels, in which blocks have operators and static_range is a loop.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from moe_dist.moe.kernels.operation import launch, operation

AMONG = {"none": 0, "true_chosen": 1, "all_chosen": 2}  # columns over which weights are a softmax; `none` means all columns
ELEMENTS = 1024  # logits that one program has in registers


@triton.jit
def softmax_of_group(logits, group_T, group_of_column, T, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live = row < T
    group = tl.load(group_T + row, mask=live, other=-1).to(tl.int32)
    owner = tl.load(group_of_column + column, mask=column < C, other=-2).to(tl.int32)
    x = tl.load(
        logits + row.to(tl.int64)[:, None] * C + column[None, :],
        mask=live[:, None] & (column < C)[None, :],
        other=float("-inf"),
    )
    # Padding (group -1) keeps all columns, because a softmax over nothing but -inf would be NaN.
    x = tl.where((owner[None, :] == group[:, None]) | (group < 0)[:, None], x, float("-inf"))
    top = tl.max(x, 1)
    top = tl.where(top == float("-inf"), 0.0, top)  # rows beyond the last token
    e = tl.exp(x - top[:, None])
    total = tl.sum(e, 1)
    total = tl.where(live, total, 1.0)
    return row, column, live, group, x, e / total[:, None], top + tl.log(total)


@triton.jit
def softmax_among(z, among):
    top = tl.max(tl.where(among, z, float("-inf")), 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    e = tl.where(among, tl.exp(tl.where(among, z, 0.0) - top[:, None]), 0.0)
    total = tl.sum(e, 1)
    return e / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def choose_kernel(
    logits,
    group_T,
    group_of_column,
    top_k,
    scale,
    choice,
    token,
    expert,
    weight,
    sums,
    T,
    C: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    AMONG: tl.constexpr,
    CHOSEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    row, column, live, group, x, p, log_z = softmax_of_group(logits, group_T, group_of_column, T, C, ROWS, COLUMNS)
    own_k = tl.load(top_k + group, mask=group >= 0, other=0).to(tl.int32)
    place = tl.arange(0, CHOICES)
    taken = tl.zeros((ROWS, CHOICES), tl.int32)
    z = tl.zeros((ROWS, CHOICES), tl.float32)
    counts = tl.zeros((ROWS, COLUMNS), tl.float32)
    rest = x
    at = row.to(tl.int64) * K
    for k in tl.static_range(K):
        if CHOSEN:
            c = tl.load(choice + at + k, mask=live, other=0).to(tl.int32)
        else:
            c = tl.argmax(rest, 1).to(tl.int32)  # the first of columns with equal logits, as in a stable sort
            tl.store(choice + at + k, c.to(tl.int64), mask=live)
        hit = column[None, :] == c[:, None]
        rest = tl.where(hit, float("-inf"), rest)
        valid = k < own_k
        counts += tl.where(hit & valid[:, None], 1.0, 0.0)
        value = tl.sum(tl.where(hit, p if AMONG == 0 else x, 0.0), 1)
        here = place[None, :] == k
        z = tl.where(here, value[:, None], z)
        taken = tl.where(here, c[:, None], taken)
    valid = place[None, :] < own_k[:, None]
    true = valid & (taken < E)
    w = z if AMONG == 0 else softmax_among(z, true if AMONG == 1 else valid)
    stored = live[:, None] & (place < K)[None, :]
    slot = at[:, None] + place[None, :]
    tl.store(token + slot, row.to(tl.int64)[:, None] + tl.zeros((ROWS, CHOICES), tl.int64), mask=stored)
    tl.store(expert + slot, tl.where(true, taken, -1).to(tl.int64), mask=stored)
    tl.store(weight + slot, tl.where(true, w * scale, 0.0), mask=stored)
    # sums: choices [C], tokens [G], probabilities [C], squares of z [G], entropies [G]
    mine = sums + tl.program_id(0) * (2 * C + 3 * G)
    tl.store(mine + column, tl.sum(counts, 0), mask=column < C)
    tl.store(mine + C + G + column, tl.sum(tl.where((group >= 0)[:, None], p, 0.0), 0), mask=column < C)
    entropy = -tl.sum(p * (tl.where(p > 0.0, x, 0.0) - log_z[:, None]), 1)  # p log p is 0 at p = 0
    for g in tl.static_range(G):
        member = group == g
        tl.store(mine + C + g, tl.sum(tl.where(member, 1.0, 0.0), 0))
        tl.store(mine + 2 * C + G + g, tl.sum(tl.where(member, log_z * log_z, 0.0), 0))
        tl.store(mine + 2 * C + 2 * G + g, tl.sum(tl.where(member, entropy, 0.0), 0))


@triton.jit
def choose_backward_kernel(
    logits,
    group_T,
    group_of_column,
    top_k,
    scale,
    choice,
    grad_weight,
    grad_prob,
    grad_square,
    out,
    T,
    C: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    AMONG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    row, column, live, group, x, p, log_z = softmax_of_group(logits, group_T, group_of_column, T, C, ROWS, COLUMNS)
    own_k = tl.load(top_k + group, mask=group >= 0, other=0).to(tl.int32)
    place = tl.arange(0, CHOICES)
    stored = live[:, None] & (place < K)[None, :]
    slot = row.to(tl.int64)[:, None] * K + place[None, :]
    taken = tl.load(choice + slot, mask=stored, other=0).to(tl.int32)
    valid = place[None, :] < own_k[:, None]
    true = valid & (taken < E)
    dw = tl.where(true, tl.load(grad_weight + slot, mask=stored, other=0.0) * scale, 0.0)
    if AMONG != 0:
        z = tl.zeros((ROWS, CHOICES), tl.float32)
        for k in tl.static_range(K):
            c = tl.sum(tl.where(place[None, :] == k, taken, 0), 1)
            value = tl.sum(tl.where(column[None, :] == c[:, None], x, 0.0), 1)
            z = tl.where(place[None, :] == k, value[:, None], z)
        w = softmax_among(z, true if AMONG == 1 else valid)
        dw = w * (dw - tl.sum(w * dw, 1)[:, None])
    of_choices = tl.zeros((ROWS, COLUMNS), tl.float32)  # gradients of p if AMONG is 0, else of logits
    for k in tl.static_range(K):
        c = tl.sum(tl.where(place[None, :] == k, taken, 0), 1)
        value = tl.sum(tl.where(place[None, :] == k, dw, 0.0), 1)
        of_choices += tl.where(column[None, :] == c[:, None], value[:, None], 0.0)
    dp = tl.load(grad_prob + column, mask=column < C, other=0.0)[None, :] + tl.zeros((ROWS, COLUMNS), tl.float32)
    dp = tl.where((group >= 0)[:, None], dp, 0.0)
    if AMONG == 0:
        dp += of_choices
    dx = p * (dp - tl.sum(p * dp, 1)[:, None])
    square = tl.load(grad_square + group, mask=group >= 0, other=0.0)
    dx += (2.0 * log_z * square)[:, None] * p
    if AMONG != 0:
        dx += of_choices
    tl.store(out + row.to(tl.int64)[:, None] * C + column[None, :], dx, mask=live[:, None] & (column < C)[None, :])


def _blocks(num_columns: int, num_choices: int) -> dict[str, int]:
    columns = triton.next_power_of_2(num_columns)
    return {"ROWS": max(1, ELEMENTS // columns), "COLUMNS": columns, "CHOICES": triton.next_power_of_2(num_choices)}


@operation(
    "choose(Tensor logits, Tensor group, Tensor group_of_column, Tensor top_k, Tensor? choice, int num_true, "
    "int num_choices, float scale, int among) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def choose(
    logits: Tensor,
    group: Tensor,
    group_of_column: Tensor,
    top_k: Tensor,
    choice: Tensor | None,
    num_true: int,
    num_choices: int,
    scale: float,
    among: int,
) -> Iterator[tuple[Tensor, ...]]:
    """Returns three int64 tensors [T, K]: chosen columns (best first), tokens of pairs, and experts of pairs (-1 if
    absent). Also returns weights [T, K], and block sums [B, 2 C + 3 G]: choices, tokens, probabilities, squares of z,
    entropies.

    Args:
        logits: fp32 [T, C].
        group: int64 [T], -1 for padding.
        top_k: int64 [G + 1], k of each group.
        choice: The columns [T, K] that an earlier call chose. None lets this call choose columns.
        among: A value of `AMONG`.
    """
    (num_tokens, num_columns), num_groups = logits.shape, top_k.shape[0] - 1
    blocks = _blocks(num_columns, num_choices)
    num_blocks, pairs = triton.cdiv(num_tokens, blocks["ROWS"]), (num_tokens, num_choices)
    chosen, token, expert = (group.new_empty(pairs) for _ in range(3))
    if choice is not None:
        chosen = choice.clone()
    weight, sums = logits.new_empty(pairs), logits.new_empty((num_blocks, 2 * num_columns + 3 * num_groups))
    yield chosen, token, expert, weight, sums
    constants = {"C": num_columns, "E": num_true, "K": num_choices, "G": num_groups, "AMONG": among}
    inputs = (logits, group, group_of_column, top_k, scale, chosen, token, expert, weight, sums, num_tokens)
    launch(choose_kernel, (num_blocks,), *inputs, **constants, CHOSEN=choice is not None, **blocks)


@operation(
    "choose_backward(Tensor logits, Tensor group, Tensor group_of_column, Tensor top_k, Tensor choice, Tensor grad_weight, "
    "Tensor grad_prob, Tensor grad_square, int num_true, float scale, int among) -> Tensor"
)
def choose_backward(
    logits: Tensor,
    group: Tensor,
    group_of_column: Tensor,
    top_k: Tensor,
    choice: Tensor,
    grad_weight: Tensor,
    grad_prob: Tensor,
    grad_square: Tensor,
    num_true: int,
    scale: float,
    among: int,
) -> Iterator[Tensor]:
    """Returns the gradient of the logits [T, C]. It is computed from the gradients of the weights [T, K], of the sums of
    probabilities [C], and of the sums of squares of z [G]."""
    (num_tokens, num_columns), num_choices = logits.shape, choice.shape[1]
    out, blocks = logits.new_empty(logits.shape), _blocks(num_columns, num_choices)
    yield out
    constants = {"C": num_columns, "E": num_true, "K": num_choices, "AMONG": among}
    inputs = (logits, group, group_of_column, top_k, scale, choice, grad_weight, grad_prob, grad_square, out, num_tokens)
    launch(choose_backward_kernel, (triton.cdiv(num_tokens, blocks["ROWS"]),), *inputs, **constants, **blocks)
