"""Triton kernels that plan an exchange for token choice. They count, but do not sort, and add nothing atomically.

    count    counts the rows to each rank and the pairs with each expert, in each block of tokens
    scan     sums these counts over all earlier blocks
    place    sorts the pairs by (rank, slot), and finds the row of each pair and the rows of each token
    arrive   brings the pairs computed here from the order of arrival into the order of slots
    collect  finds the pairs of each arrived row by binary search, because the rows of a run ascend

`dispatch/planning.py` is the reference for these kernels, and defines the place of a rank and the bin of an expert. Shape
letters: T tokens, K choices, N = T x K pairs, W ranks, E experts, B blocks of tokens, X runs of arriving pairs (a run has
the pairs of one slot and source rank), H source ranks (this rank first), Q pairs computed here, R rows that arrived.
"""

# Triton's type annotations do not describe kernels, in which blocks have operators and static_range is a loop.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.moe.kernels.operation import launch, operation

INT32 = torch.int32
ELEMENTS = 1024  # numbers of a table [tokens, experts] that one program has in registers
BLOCK = 256  # items of a list that one program takes


@triton.jit
def members(expert, place_E, bin_E, T, K: tl.constexpr, ROWS: tl.constexpr, BINS: tl.constexpr, PLACES: tl.constexpr):
    """Returns the tokens of this Triton program, and for each token its ranks and its experts as rows of 0 and 1."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place, bin = tl.arange(0, PLACES), tl.arange(0, BINS)
    has_place = tl.zeros((ROWS, PLACES), tl.int32)
    has_bin = tl.zeros((ROWS, BINS), tl.int32)
    for k in tl.static_range(K):
        e = tl.load(expert + t * K + k, mask=t < T, other=-1)
        p = tl.load(place_E + e, mask=e >= 0, other=-1).to(tl.int32)
        b = tl.load(bin_E + e, mask=e >= 0, other=-1).to(tl.int32)
        has_place = tl.where(place[None, :] == p[:, None], 1, has_place)
        has_bin = tl.where(bin[None, :] == b[:, None], 1, has_bin)
    return t, place, bin, has_place, has_bin


@triton.jit(do_not_specialize=["T", "B"])
def count_kernel(
    expert,
    place_E,
    bin_E,
    counts,
    T,
    B,
    K: tl.constexpr,
    W: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    PLACES: tl.constexpr,
):
    _, place, bin, has_place, has_bin = members(expert, place_E, bin_E, T, K, ROWS, BINS, PLACES)
    mine = counts + tl.program_id(0)
    tl.store(mine + place * B, tl.sum(has_place, 0), mask=place < W)
    tl.store(mine + (W + bin) * B, tl.sum(has_bin, 0), mask=bin < E)


@triton.jit
def orders(starts, totals, place, bin, has_place, has_bin, B, W: tl.constexpr, E: tl.constexpr):
    """Returns four tensors: the number of pairs of each bin; the index of each pair (token, bin) among all sorted pairs;
    the index of each token's row among the rows for a place; and the number of rows for each place in earlier blocks."""
    block, known = tl.program_id(0), bin < E
    length = tl.load(totals + W + bin, mask=known, other=0)
    before = tl.cumsum(length, 0) - length + tl.load(starts + (W + bin) * B + block, mask=known, other=0)
    to_pair = tl.cumsum(has_bin, 0) - has_bin + before[None, :]
    before = tl.load(starts + place * B + block, mask=place < W, other=0)
    return length, to_pair, tl.cumsum(has_place, 0) - has_place + before[None, :], before


@triton.jit(do_not_specialize=["B"])
def scan_kernel(counts, column_M, starts, totals, message, B, BLOCK: tl.constexpr):
    column = tl.load(column_M + tl.program_id(0))
    total = tl.full((), 0, tl.int32)
    first = tl.full((), 0, tl.int32)
    while first < B:
        b = first + tl.arange(0, BLOCK)
        n = tl.load(counts + column * B + b, mask=b < B, other=0)
        tl.store(starts + column * B + b, total + tl.cumsum(n, 0) - n, mask=b < B)
        total += tl.sum(n, 0)
        first += BLOCK
    tl.store(totals + column, total)
    tl.store(message + tl.program_id(0), total.to(tl.int64))


@triton.jit(do_not_specialize=["T", "B"])
def place_kernel(
    expert,
    place_E,
    bin_E,
    starts,
    totals,
    pair,
    index,
    token,
    order,
    first,
    T,
    B,
    K: tl.constexpr,
    W: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    PLACES: tl.constexpr,
):
    t, place, bin, has_place, has_bin = members(expert, place_E, bin_E, T, K, ROWS, BINS, PLACES)
    _, to_pair, to_row, before = orders(starts, totals, place, bin, has_place, has_bin, B, W, E)
    length = tl.load(totals + place, mask=place < W, other=0)
    row_start = tl.cumsum(length, 0) - length
    for k in tl.static_range(K):
        e = tl.load(expert + t * K + k, mask=t < T, other=-1)
        p = tl.load(place_E + e, mask=e >= 0, other=-1).to(tl.int32)
        b = tl.load(bin_E + e, mask=e >= 0, other=-1).to(tl.int32)
        at = tl.sum(tl.where(bin[None, :] == b[:, None], to_pair, 0), 1)
        row = tl.sum(tl.where(place[None, :] == p[:, None], to_row, 0), 1)
        tl.store(pair + at, t * K + k, mask=e >= 0)
        tl.store(index + at, row, mask=e >= 0)
    taken = has_place == 1
    tl.store(token + row_start[None, :] + to_row, t[:, None] + tl.zeros((ROWS, PLACES), tl.int64), mask=taken)
    # the rows of each token; the row for this rank is first, because own rows have lower numbers
    own = place == W - 1
    has_own = tl.sum(tl.where(own[None, :], has_place, 0), 1)
    num_own = tl.sum(tl.where(own, length, 0), 0)
    remote = tl.where(own[None, :], 0, has_place)
    nth = tl.where(own[None, :], 0, has_own[:, None] + tl.cumsum(remote, 1) - remote)
    item = tl.where(own[None, :], to_row, num_own + row_start[None, :] + to_row)
    num_rows = tl.sum(has_place, 1)
    begin = tl.sum(before, 0) + tl.cumsum(num_rows, 0) - num_rows
    tl.store(order + begin[:, None] + nth, item, mask=taken)
    tl.store(first + t, begin, mask=t < T)
    tl.store(first + t + 1, begin + num_rows, mask=t == T - 1)


@triton.jit
def index_at(own, arrived, num_own, at, mask):
    """Returns the row index of the pairs with the numbers `at`. Pairs are numbered in order of arrival, own pairs first."""
    mine = tl.load(own + at, mask=mask & (at < num_own), other=0)
    return mine + tl.load(arrived + at - num_own, mask=mask & (at >= num_own), other=0)


@triton.jit(do_not_specialize=["num_own", "X", "H"])
def arrive_kernel(own, arrived, runs, order, row, num_own, X, H, BLOCK: tl.constexpr):
    x = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = n < tl.load(runs + x)
    at = tl.load(runs + 2 * X + x) + n
    q = tl.load(runs + X + x) + n
    tl.store(order + q, at, mask=live)
    first_row = tl.load(runs + 3 * X + H + x % H)
    tl.store(row + q, first_row + index_at(own, arrived, num_own, at, live), mask=live)


@triton.jit(do_not_specialize=["num_own", "X", "H", "steps", "R"])
def collect_kernel(own, arrived, runs, order, first, num_own, X, H, steps, R, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    h = tl.program_id(0)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = i < tl.load(runs + 3 * X + h)
    x = tl.arange(0, SLOTS) * H + h
    real = x < X
    length = tl.load(runs + x, mask=real, other=0)
    begin = tl.load(runs + 2 * X + x, mask=real, other=0)
    low = tl.zeros((ROWS, SLOTS), tl.int64)
    high = low + length[None, :]
    while steps > 0:
        middle = (low + high) // 2
        apart = (low < high) & live[:, None]
        less = index_at(own, arrived, num_own, begin[None, :] + middle, apart) < i[:, None]
        low = tl.where(apart & less, middle + 1, low)
        high = tl.where(apart & ~less, middle, high)
        steps -= 1
    inside = (low < length[None, :]) & live[:, None]
    found = inside & (index_at(own, arrived, num_own, begin[None, :] + low, inside) == i[:, None])
    place = tl.load(runs + 3 * X + 2 * H + h) + tl.sum(low, 1)
    taken = found.to(tl.int64)
    at = place[:, None] + tl.cumsum(taken, 1) - taken
    tl.store(order + at, tl.load(runs + X + x, mask=real, other=0)[None, :] + low, mask=found)
    tl.store(first + tl.load(runs + 3 * X + H + h) + i, place, mask=live)
    if (h == 0) & (tl.program_id(1) == 0):
        tl.store(first + R, tl.load(runs + 3 * X + 3 * H))


def blocks(num_places: int, num_bins: int) -> dict[str, int]:
    """Returns the block sizes of a Triton program: its number of tokens (ROWS), and the numbers of experts (BINS) and ranks
    (PLACES), each rounded up to a power of 2."""
    places, bins = triton.next_power_of_2(max(1, num_places)), triton.next_power_of_2(max(1, num_bins))
    return {"ROWS": max(1, ELEMENTS // max(places, bins)), "BINS": bins, "PLACES": places}


@operation("plan_count(Tensor expert, Tensor place, Tensor bin, int num_ranks) -> Tensor")
def plan_count(expert: Tensor, place: Tensor, bin: Tensor, num_ranks: int) -> Iterator[Tensor]:
    """Returns int32 [W + E, B]: for each block of tokens, the number of rows for the rank at each place, then the number of
    pairs of each bin.

    Args:
        expert: int64 [T, K], -1 for absent pairs. The experts of a token are distinct.
        place, bin: int64 [E + 1], the place of each expert's rank, and the bin of each expert.
    """
    (num_tokens, num_choices), num_experts = expert.shape, place.shape[0] - 1
    sizes = blocks(num_ranks, num_experts)
    num_blocks = triton.cdiv(num_tokens, sizes["ROWS"])
    counts = expert.new_empty((num_ranks + num_experts, num_blocks), dtype=INT32)
    yield counts
    inputs = (expert, place, bin, counts, num_tokens, num_blocks)
    launch(count_kernel, (num_blocks,), *inputs, K=num_choices, W=num_ranks, E=num_experts, **sizes)


@operation("plan_scan(Tensor counts, Tensor column) -> (Tensor, Tensor, Tensor)")
def plan_scan(counts: Tensor, column: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Returns three tensors: for each block the sums of the counts of all earlier blocks, int32 [W + E, B]; the sums over
    all blocks, int32 [W + E]; and these sums in the order of `column`, int64 [W + E]."""
    starts, totals = counts.new_empty(counts.shape), counts.new_empty(counts.shape[:1])
    message = column.new_empty(column.shape)
    yield starts, totals, message
    launch(scan_kernel, column.shape, counts, column, starts, totals, message, counts.shape[1], BLOCK=BLOCK)


@operation(
    "plan_place(Tensor expert, Tensor place, Tensor bin, Tensor starts, Tensor totals, int num_ranks) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def plan_place(
    expert: Tensor, place: Tensor, bin: Tensor, starts: Tensor, totals: Tensor, num_ranks: int
) -> Iterator[tuple[Tensor, ...]]:
    """Returns four lists of length N, whose filled length only the device knows: the pairs sorted by bin, int64; the index
    of each pair's row among its rank's rows, int32; the tokens of the rows sorted by place, int64; and the rows sorted by
    token, int32. Also returns the index of each token's first row in the last list, int32 [T + 1]."""
    (num_tokens, num_choices), num_experts, num_blocks = expert.shape, place.shape[0] - 1, starts.shape[1]
    pair, token = expert.new_empty(expert.numel()), expert.new_empty(expert.numel())
    index, order = (expert.new_empty(expert.numel(), dtype=INT32) for _ in range(2))
    first = expert.new_empty(num_tokens + 1, dtype=INT32)
    yield pair, index, token, order, first
    inputs = (expert, place, bin, starts, totals, pair, index, token, order, first, num_tokens, num_blocks)
    sizes = blocks(num_ranks, num_experts)
    launch(place_kernel, (num_blocks,), *inputs, K=num_choices, W=num_ranks, E=num_experts, **sizes)


@operation("plan_arrive(Tensor own, Tensor arrived, Tensor runs, int num_sources, int longest) -> (Tensor, Tensor)")
def plan_arrive(
    own: Tensor, arrived: Tensor, runs: Tensor, num_sources: int, longest: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns for each pair computed here, in the order of slots, its index in the order of arrival and its row, int64.

    Args:
        own, arrived: int32, for each own pair and each received pair the index of its row among the source rank's rows.
        runs: int64 [3 X + 3 H + 1]. First come for all runs (sorted by slot, then source rank) the lengths, the starts in
            the order of slots, and the starts in the order of arrival. Then come for all source ranks the numbers of rows,
            the indices of the first rows, and the numbers of earlier pairs. The last entry is the number of all pairs.
        longest: Length of the longest run.
    """
    num_pairs, num_runs = own.shape[0] + arrived.shape[0], runs.shape[0] // 3 - num_sources
    order, row = runs.new_empty(num_pairs), runs.new_empty(num_pairs)
    yield order, row
    grid = (num_runs, triton.cdiv(longest, BLOCK))
    launch(arrive_kernel, grid, own, arrived, runs, order, row, own.shape[0], num_runs, num_sources, BLOCK=BLOCK)


@operation(
    "plan_collect(Tensor own, Tensor arrived, Tensor runs, int num_sources, int longest, int num_rows, int most_rows) -> "
    "(Tensor, Tensor)"
)
def plan_collect(
    own: Tensor, arrived: Tensor, runs: Tensor, num_sources: int, longest: int, num_rows: int, most_rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns `RowIndex.items_of_rows` of the pairs computed here: int32 [Q] and [R + 1]. `most_rows` is the largest number
    of rows from one source rank. `plan_arrive` explains all other arguments."""
    num_pairs, num_runs = own.shape[0] + arrived.shape[0], runs.shape[0] // 3 - num_sources
    order, first = own.new_empty(num_pairs), own.new_empty(num_rows + 1)
    yield order, first
    slots = triton.next_power_of_2(max(1, num_runs // num_sources))
    rows = max(1, ELEMENTS // 2 // slots)  # four tables of int64 in registers
    sizes = (own.shape[0], num_runs, num_sources, longest.bit_length(), num_rows)
    grid = (num_sources, triton.cdiv(most_rows, rows))
    launch(collect_kernel, grid, own, arrived, runs, order, first, *sizes, ROWS=rows, SLOTS=slots)
