"""Triton kernels for expert choice. They run before and after torch sorts the logits.

    candidates  masks the logits of tokens outside of the expert's group with -inf, and counts the tokens in the group
    take        finds the tokens that each expert takes, and its k-th largest score, from the sorted tokens
    sums        computes the scores, entropies and counts that the layer reports

`routers/selection.py` and `routers/expert_choice.py` have a reference for each kernel. Each Triton program writes the sums
of one block, so nothing is added atomically. Shape letters: T tokens, E experts, G expert groups, B blocks of tokens.
"""

# Triton's type annotations do not describe kernels, in which blocks have operators and static_range is a loop.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.moe.kernels.operation import launch, operation

ELEMENTS = 1024  # logits that one program has in registers
TINY = torch.finfo(torch.float32).tiny


@triton.jit
def tokens_and_experts(group_T, group_of_expert, T, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns a block's tokens and experts, the group of each token, and whether the token and the expert share a group."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    group = tl.load(group_T + row, mask=row < T, other=-1).to(tl.int32)
    owner = tl.load(group_of_expert + column, mask=column < E, other=-2).to(tl.int32)
    at = row.to(tl.int64)[:, None] * E + column[None, :]
    return column, group, at, (row < T)[:, None] & (column < E)[None, :], group[:, None] == owner[None, :]


@triton.jit
def candidates_kernel(
    logits, group_T, group_of_expert, out, counts, T, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column, _, at, live, inside = tokens_and_experts(group_T, group_of_expert, T, E, ROWS, COLUMNS)
    x = tl.where(inside, tl.load(logits + at, mask=live, other=float("-inf")), float("-inf"))
    tl.store(out + at, x, mask=live)
    number = tl.sum(tl.where(x != float("-inf"), 1, 0), 0)
    tl.store(counts + tl.program_id(0) * E + column, number, mask=column < E)


@triton.jit
def take_kernel(
    logits,
    order,
    order_of_scores,
    capacity,
    candidates,
    taken,
    kth_score,
    T,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    known = column < E
    share = tl.load(capacity + column, mask=known, other=0.0)
    number = tl.load(candidates + column, mask=known, other=0)
    room = tl.minimum(tl.maximum(tl.ceil(share * number.to(tl.float64) - 1e-9).to(tl.int64), 0), number)
    at = place.to(tl.int64)[:, None] * E + column[None, :]
    live = (place < T)[:, None] & known[None, :]
    token = tl.load(order + at, mask=live, other=0)
    tl.store(taken + token * E + column[None, :], (place[:, None] < room[None, :]).to(tl.uint8), mask=live)
    if tl.program_id(0) == 0:
        # An expert with a capacity of 1 takes all tokens of its group, so its threshold must be 0.
        scored = known & (room > 0) & (share < 1.0)
        last = tl.load(order_of_scores + (room - 1) * E + column, mask=scored, other=0)
        score = tl.sigmoid(tl.load(logits + last * E + column, mask=scored, other=0.0))
        tl.store(kth_score + column, tl.where(scored, score, 0.0), mask=known)


@triton.jit
def sums_kernel(
    logits,
    group_T,
    group_of_expert,
    threshold,
    taken,
    sums,
    T,
    E: tl.constexpr,
    G: tl.constexpr,
    TINY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column, group, at, live, inside = tokens_and_experts(group_T, group_of_expert, T, E, ROWS, COLUMNS)
    score = tl.where(inside & live, tl.sigmoid(tl.load(logits + at, mask=live, other=0.0)), 0.0)
    share = score / tl.maximum(tl.sum(score, 1), TINY)[:, None]
    entropy = -tl.sum(share * tl.log(tl.where(share > 0.0, share, 1.0)), 1)
    chosen = tl.load(taken + at, mask=live, other=0).to(tl.float32)
    bound = tl.load(threshold + column, mask=column < E, other=0.0)
    above = tl.where(inside & live & (score > bound[None, :]), 1.0, 0.0)
    idle = tl.sum(chosen, 1) == 0.0
    # choices [E], tokens [G], tokens above the threshold [E], tokens without an expert [G], scores [E], entropies [G]
    mine = sums + tl.program_id(0) * (3 * E + 3 * G)
    known = column < E
    tl.store(mine + column, tl.sum(chosen, 0), mask=known)
    tl.store(mine + E + G + column, tl.sum(above, 0), mask=known)
    tl.store(mine + 2 * E + 2 * G + column, tl.sum(score, 0), mask=known)
    for g in tl.static_range(G):
        member = tl.where(group == g, 1.0, 0.0)
        tl.store(mine + E + g, tl.sum(member, 0))
        tl.store(mine + 2 * E + G + g, tl.sum(tl.where(idle, member, 0.0), 0))
        tl.store(mine + 3 * E + 2 * G + g, tl.sum(member * entropy, 0))


def _blocks(num_experts: int) -> dict[str, int]:
    columns = triton.next_power_of_2(num_experts)
    return {"ROWS": max(1, ELEMENTS // columns), "COLUMNS": columns}


@operation("choice_candidates(Tensor logits, Tensor group, Tensor group_of_expert) -> (Tensor, Tensor)")
def choice_candidates(logits: Tensor, group: Tensor, group_of_expert: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns two tensors: the logits [T, E], which are -inf for tokens outside of the expert's group, and the number of
    each block's tokens in each expert's group, int64 [B, E].

    Args:
        logits: fp32 [T, E].
        group: int64 [T], -1 for padding.
        group_of_expert: int64 [E].
    """
    (num_tokens, num_experts), blocks = logits.shape, _blocks(logits.shape[1])
    num_blocks = triton.cdiv(num_tokens, blocks["ROWS"])
    out, counts = logits.new_empty(logits.shape), group.new_empty((num_blocks, num_experts))
    yield out, counts
    launch(
        candidates_kernel, (num_blocks,), logits, group, group_of_expert, out, counts, num_tokens, E=num_experts, **blocks
    )


@operation(
    "choice_take(Tensor logits, Tensor order, Tensor order_of_scores, Tensor capacity, Tensor candidates) -> "
    "(Tensor, Tensor)"
)
def choice_take(
    logits: Tensor, order: Tensor, order_of_scores: Tensor, capacity: Tensor, candidates: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns a uint8 [T, E] that is 1 where the expert takes the token, and each expert's k-th largest score [E].

    Args:
        logits: The logits of candidates, without noise. The candidates of an expert are the tokens of its group.
        order, order_of_scores: int64 [T, E], each expert's tokens by falling logit, with noise and without noise.
        capacity: float64 [E], fraction of its candidates that each expert takes.
        candidates: Number of each expert's candidates, int64 [E].
    """
    (num_tokens, num_experts), blocks = logits.shape, _blocks(logits.shape[1])
    taken, kth_score = logits.new_empty(logits.shape, dtype=torch.uint8), logits.new_empty(num_experts)
    yield taken, kth_score
    inputs = (logits, order, order_of_scores, capacity, candidates, taken, kth_score, num_tokens)
    grid = (max(1, triton.cdiv(num_tokens, blocks["ROWS"])),)  # at least one block, which writes the scores

    # No fused multiply-add, so that this kernel computes the same number of tokens as the host (`tokens_of_share`).
    launch(take_kernel, grid, *inputs, E=num_experts, **blocks, enable_fp_fusion=False)


@operation(
    "choice_sums(Tensor logits, Tensor group, Tensor group_of_expert, Tensor threshold, Tensor taken, int num_groups) -> "
    "Tensor"
)
def choice_sums(
    logits: Tensor, group: Tensor, group_of_expert: Tensor, threshold: Tensor, taken: Tensor, num_groups: int
) -> Iterator[Tensor]:
    """Returns the sums of each block, [B, 3 E + 3 G]: choices, tokens, tokens above the threshold, tokens that no expert
    takes, scores, entropies. `taken` is uint8 [T, E]. `choice_candidates` describes the first three arguments."""
    (num_tokens, num_experts), blocks = logits.shape, _blocks(logits.shape[1])
    num_blocks = triton.cdiv(num_tokens, blocks["ROWS"])
    sums = logits.new_empty((num_blocks, 3 * (num_experts + num_groups)))
    yield sums
    inputs = (logits, group, group_of_expert, threshold, taken, sums, num_tokens)
    launch(sums_kernel, (num_blocks,), *inputs, E=num_experts, G=num_groups, TINY=TINY, **blocks)
