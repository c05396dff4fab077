"""Triton kernels that plan an exchange of fixed sizes, for token choice. The kernels of this module run after `count` and
`scan` of `plan.py`:

    place    finds the pairs and rows for each rank, and the rows of each token
    pad      fills the places of pairs and rows that stay empty
    runs     finds the runs of arriving pairs, and counts the rows and pairs that exceed the room
    arrive   brings the pairs computed here into the order of slots

After these kernels, `collect` of `plan.py` finds the pairs of each row. `dispatch/static_planning.py` is the reference.
`static.py` defines padding, and the room: the fixed numbers of rows and pairs. If a rank has more rows or pairs than its
room, it computes no pairs, so that every index stays inside its tensor. The training step then fails. Shape letters are as
in `static.py`; K choices, E experts and B blocks of tokens are as in `plan.py`.
"""

# Triton's type annotations do not describe kernels, in which blocks have operators and static_range is a loop.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from moe_dist.moe.kernels import plan
from moe_dist.moe.kernels.operation import launch, operation
from moe_dist.moe.kernels.plan import INT32, index_at, members, orders

BLOCK = 256  # items of a list that one program takes


@triton.jit
def room_at(first, w, mask):
    """Returns the fixed number of pairs or rows (the room) for the rank at place `w`."""
    return tl.load(first + w + 1, mask=mask, other=0) - tl.load(first + w, mask=mask, other=0)


@triton.jit(do_not_specialize=["T", "B"])
def place_kernel(
    expert,
    place_E,
    bin_E,
    starts,
    totals,
    first_bin,
    first_pair,
    first_row,
    pair,
    index,
    row,
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
    length, to_pair, to_row, _ = orders(starts, totals, place, bin, has_place, has_bin, B, W, E)
    other = place < W - 1
    for k in tl.static_range(K):
        e = tl.load(expert + t * K + k, mask=t < T, other=-1)
        p = tl.load(place_E + e, mask=e >= 0, other=0)
        b = tl.load(bin_E + e, mask=e >= 0, other=-1).to(tl.int32)
        own = p == W - 1
        begin = tl.load(first_bin + p).to(tl.int32)
        nth = tl.sum(tl.where(bin[None, :] == b[:, None], to_pair, 0), 1)
        nth -= tl.sum(tl.where(bin[None, :] < begin[:, None], length[None, :], 0), 1)
        r = tl.sum(tl.where(place[None, :] == p.to(tl.int32)[:, None], to_row, 0), 1)
        at = tl.load(first_pair + p) + nth
        fits = own | (at < tl.load(first_pair + p + 1, mask=~own, other=0))
        sent = own | (tl.load(first_row + p) + r < tl.load(first_row + p + 1, mask=~own, other=0))
        tl.store(pair + at, tl.where(sent, t * K + k, t * 0 + T * K), mask=(e >= 0) & fits)
        tl.store(index + at, tl.where(own, t.to(tl.int32), tl.where(sent, r, -1)), mask=(e >= 0) & fits)
    row_start = tl.load(first_row + place, mask=other, other=0).to(tl.int32)
    room = room_at(first_row, place, other).to(tl.int32)
    sent = (has_place == 1) & (to_row < room[None, :])  # never true for own rows, whose room is 0
    tl.store(row + row_start[None, :] + to_row, t[:, None] + tl.zeros((ROWS, PLACES), tl.int64), mask=sent)
    # the rows of each token, the own row first; each token has one own row
    begin = t.to(tl.int32) + tl.sum(tl.minimum(to_row, room[None, :]), 1)
    nth = tl.cumsum(sent.to(tl.int32), 1) - sent.to(tl.int32)
    tl.store(order + begin, t.to(tl.int32), mask=t < T)
    tl.store(order + begin[:, None] + 1 + nth, T + 1 + row_start[None, :] + to_row, mask=sent)
    tl.store(first + t, begin, mask=t < T)


@triton.jit(do_not_specialize=["T", "N"])
def pad_kernel(
    totals,
    first_bin,
    first_pair,
    first_row,
    pair,
    index,
    row,
    first,
    pairs_W,
    T,
    N,
    W: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    PLACES: tl.constexpr,
):
    w, part = tl.program_id(0), tl.program_id(1)
    n = part * BLOCK + tl.arange(0, BLOCK)
    own, other = w == W - 1, w < W - 1
    bin = tl.arange(0, BINS)
    inside = (bin >= tl.load(first_bin + w)) & (bin < tl.load(first_bin + w + 1))
    taken = tl.sum(tl.load(totals + W + bin, mask=inside, other=0), 0)
    begin = tl.load(first_pair + w)
    room = tl.load(first_pair + w + 1, mask=other, other=0) - begin
    unused = (n >= taken) & (n < tl.where(own, N, room))
    tl.store(pair + begin + n, n * 0 + N.to(tl.int64), mask=unused)
    tl.store(index + begin + n, n * 0 + tl.where(own, T, -1), mask=unused)
    begin = tl.load(first_row + w)
    room = tl.load(first_row + w + 1, mask=other, other=0) - begin
    tl.store(row + begin + n, n * 0 + T.to(tl.int64), mask=(n >= tl.load(totals + w)) & (n < tl.where(other, room, 0)))
    if part == 0:
        tl.store(pairs_W + w, taken)
        if own:
            place = tl.arange(0, PLACES)
            rooms = room_at(first_row, place, place < W - 1)
            rows = tl.minimum(tl.load(totals + place, mask=place < W - 1, other=0), rooms)
            tl.store(first + T, T + tl.sum(rows, 0))
            tl.store(first + T + 1, T + tl.sum(rows, 0))


@triton.jit(do_not_specialize=["M", "N", "row_room", "pair_room", "S", "G"])
def runs_kernel(
    received,
    totals,
    pairs_W,
    first_pair,
    first_row,
    source_H,
    group_X,
    computed_G,
    runs,
    counts_X,
    end_X,
    sent_5,
    M,
    N,
    row_room,
    pair_room,
    S,
    G,
    X: tl.constexpr,
    W: tl.constexpr,
    SLOTS: tl.constexpr,
    SOURCES: tl.constexpr,
):
    x, h = tl.arange(0, SLOTS), tl.arange(0, SOURCES)
    slot, source = x < X, h < W
    begin = tl.load(source_H + h, mask=source, other=0) * (1 + X)
    rows_H = tl.load(received + begin, mask=source, other=0)
    both = slot[:, None] & source[None, :]
    length = tl.load(received + begin[None, :] + 1 + x[:, None], mask=both, other=0)
    total_X, pairs_H = tl.sum(length, 1), tl.sum(length, 0)
    group = tl.load(group_X + x, mask=slot, other=-1)
    q_X = tl.cumsum(total_X, 0) - total_X
    over, g = tl.full((), 0, tl.int64), 0
    padding, end = q_X * 0, q_X * 0
    while g < G:
        room = tl.load(computed_G + g)
        unused = room - tl.sum(tl.where(group == g, total_X, 0), 0)
        over += tl.maximum(-unused, 0)
        padding += tl.where(group > g, unused, 0)
        before = tl.sum(tl.where(group < g, total_X, 0), 0)
        end = tl.where(group == g, q_X + total_X - before, end)
        g += 1
    wrong = (h > 0) & ((rows_H > row_room) | (pairs_H > pair_room))
    fit = (over == 0) & (tl.sum(wrong.to(tl.int32), 0) == 0)
    length, total_X, pairs_H = tl.where(fit, length, 0), tl.where(fit, total_X, 0), tl.where(fit, pairs_H, 0)
    q = (q_X + padding)[:, None] + tl.cumsum(length, 1) - length
    at = tl.where(h == 0, 0, N + (h - 1) * pair_room)[None, :] + tl.cumsum(length, 0) - length
    mine = runs + x[:, None] * W + h[None, :]
    tl.store(mine, length, mask=both)
    tl.store(mine + X * W, q, mask=both)
    tl.store(mine + 2 * X * W, at, mask=both)
    mine = runs + 3 * X * W + h
    tl.store(mine, tl.where(h == 0, M, row_room), mask=source)
    tl.store(mine + W, tl.where(h == 0, 0, M + (h - 1) * row_room), mask=source)
    tl.store(mine + 2 * W, tl.cumsum(pairs_H, 0) - pairs_H, mask=source)
    tl.store(runs + 3 * X * W + 3 * W, tl.sum(pairs_H, 0))
    tl.store(counts_X + x, total_X, mask=slot)
    tl.store(end_X + x, tl.where(fit, end, 0).to(tl.int32), mask=slot)
    # pairs and rows that this rank sends to each place; the last place is this rank
    other = h < W - 1
    rows_W = tl.load(totals + h, mask=other, other=0).to(tl.int64)
    sent_W = tl.load(pairs_W + h, mask=source, other=0)
    row_rooms, pair_rooms = room_at(first_row, h, other), room_at(first_pair, h, other)
    over += tl.sum(tl.maximum(rows_W - row_rooms, 0), 0)
    over += tl.sum(tl.where(other, tl.maximum(sent_W - pair_rooms, 0), 0), 0)
    tl.store(sent_5, tl.sum(rows_W, 0))
    tl.store(sent_5 + 1, tl.sum(sent_W, 0))
    tl.store(sent_5 + 2, tl.sum(tl.where(other, sent_W, 0), 0))
    tl.store(sent_5 + 3, S - tl.sum(rows_W, 0))
    tl.store(sent_5 + 4, over)


@triton.jit(do_not_specialize=["num_own", "num_pairs", "X", "H", "T", "Q", "steps"])
def arrive_kernel(own, arrived, runs, order, row, num_own, num_pairs, X, H, T, Q, steps, BLOCK: tl.constexpr):
    q = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = q * 0
    high = low + X
    while steps > 0:  # the first run that begins after q
        middle = (low + high) // 2
        before = (low < high) & (tl.load(runs + X + middle, mask=low < high, other=0) <= q)
        high = tl.where(before, high, middle)
        low = tl.where(before, middle + 1, low)
        steps -= 1
    x = low - 1
    n = q - tl.load(runs + X + x, mask=x >= 0, other=0)
    live = n < tl.load(runs + x, mask=x >= 0, other=0)
    at = tl.load(runs + 2 * X + x, mask=live, other=0) + n
    first_row = tl.load(runs + 3 * X + H + x % H, mask=live, other=0)
    tl.store(order + q, tl.where(live, at, num_pairs), mask=q < Q)
    tl.store(row + q, tl.where(live, first_row + index_at(own, arrived, num_own, at, live), T), mask=q < Q)


@operation(
    "static_place(Tensor expert, Tensor place, Tensor bin, Tensor starts, Tensor totals, Tensor first_bin, "
    "Tensor first_pair, Tensor first_row, int num_sent, int num_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def static_place(
    expert: Tensor,
    place: Tensor,
    bin: Tensor,
    starts: Tensor,
    totals: Tensor,
    first_bin: Tensor,
    first_pair: Tensor,
    first_row: Tensor,
    num_sent: int,
    num_rows: int,
) -> Iterator[tuple[Tensor, ...]]:
    """Returns lists in which `static_pad` later writes the padding: the plan's `pair_P`; the row index of each of these
    pairs, int32 (for an own pair its token); the plan's `row_S`; and `items_of_rows` of the plan's table.

    Args:
        expert, place, bin: See `plan_count`.
        starts, totals: From `plan_scan`.
        first_bin: int64 [W + 1], first bin of the rank at each place.
        first_pair, first_row: int64 [W], indices of the first pair and of the first row for each rank, this rank last.
        num_sent, num_rows: Numbers of pairs and of rows that this rank sends, including padding.
    """
    (num_tokens, num_choices), num_experts, size = expert.shape, place.shape[0] - 1, first_row.shape[0]
    pair, row = expert.new_empty(num_sent + expert.numel()), expert.new_empty(num_rows)
    index = expert.new_empty(pair.shape, dtype=INT32)
    order, first = (expert.new_empty(n, dtype=INT32) for n in (num_tokens + 1 + num_rows, num_tokens + 2))
    yield pair, index, row, order, first
    inputs = (expert, place, bin, starts, totals, first_bin, first_pair, first_row, pair, index, row, order, first)
    constants = {"K": num_choices, "W": size, "E": num_experts, **plan.blocks(size, num_experts)}
    launch(place_kernel, (starts.shape[1],), *inputs, num_tokens, starts.shape[1], **constants)


@operation(
    "static_pad(Tensor totals, Tensor first_bin, Tensor first_pair, Tensor first_row, Tensor(a!) pair, Tensor(b!) index, "
    "Tensor(c!) row, Tensor(d!) first, int num_pairs, int most) -> Tensor"
)
def static_pad(
    totals: Tensor,
    first_bin: Tensor,
    first_pair: Tensor,
    first_row: Tensor,
    pair: Tensor,
    index: Tensor,
    row: Tensor,
    first: Tensor,
    num_pairs: int,
    most: int,
) -> Iterator[Tensor]:
    """Writes the padding into the lists of `static_place`. Returns the number of pairs for the rank at each place, int64
    [W]. `num_pairs` is N. `most` is the maximum of N and all rooms for pairs and rows. `static_place` describes all other
    arguments."""
    size, num_experts = first_row.shape[0], totals.shape[0] - first_row.shape[0]
    pairs_W = pair.new_empty(size)
    yield pairs_W
    num_tokens = first.shape[0] - 2
    inputs = (totals, first_bin, first_pair, first_row, pair, index, row, first, pairs_W)
    bounds = plan.blocks(size, num_experts)
    constants = {"W": size, "E": num_experts, "BLOCK": BLOCK, "BINS": bounds["BINS"], "PLACES": bounds["PLACES"]}
    launch(pad_kernel, (size, max(1, triton.cdiv(most, BLOCK))), *inputs, num_tokens, num_pairs, **constants)


@operation(
    "static_runs(Tensor received, Tensor totals, Tensor pairs, Tensor first_pair, Tensor first_row, Tensor source, "
    "Tensor group, Tensor computed, int num_own_rows, int num_pairs, int row_room, int pair_room, int num_rows) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
def static_runs(
    received: Tensor,
    totals: Tensor,
    pairs: Tensor,
    first_pair: Tensor,
    first_row: Tensor,
    source: Tensor,
    group: Tensor,
    computed: Tensor,
    num_own_rows: int,
    num_pairs: int,
    row_room: int,
    pair_room: int,
    num_rows: int,
) -> Iterator[tuple[Tensor, ...]]:
    """Returns the runs of `plan_arrive`, and `counts_X`, `end_X` and `sent_5` of the plan.

    Args:
        received: int64 [W, 1 + X], the number of rows from each rank, then the number of its pairs for each slot.
        pairs: From `static_pad`. `static_place` explains `totals`, `first_pair`, `first_row` and `num_rows`.
        source: int64 [W], ranks in the order of arrival.
        group, computed: int64, the group of each slot, and the room for each group's pairs.
        num_own_rows, num_pairs: The numbers T + 1 of own rows and N of places for own pairs.
        row_room, pair_room: Numbers of rows and pairs that each other rank may send to this rank.
    """
    size, slots = source.shape[0], group.shape[0]
    runs = received.new_empty(3 * size * slots + 3 * size + 1)
    counts_X, end_X, sent_5 = received.new_empty(slots), totals.new_empty(slots), received.new_empty(5)
    yield runs, counts_X, end_X, sent_5
    inputs = (received, totals, pairs, first_pair, first_row, source, group, computed, runs, counts_X, end_X, sent_5)
    numbers = (num_own_rows, num_pairs, row_room, pair_room, num_rows, computed.shape[0])
    powers = {"SLOTS": triton.next_power_of_2(max(1, slots)), "SOURCES": triton.next_power_of_2(size)}
    launch(runs_kernel, (1,), *inputs, *numbers, X=slots, W=size, **powers)


@operation(
    "static_arrive(Tensor own, Tensor arrived, Tensor runs, int num_sources, int num_computed, int num_tokens) -> "
    "(Tensor, Tensor)"
)
def static_arrive(
    own: Tensor, arrived: Tensor, runs: Tensor, num_sources: int, num_computed: int, num_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns `arrival_Q` and `row_of_pair_Q` of the plan. `plan_arrive` describes the other arguments.

    Args:
        num_computed: Q, the room for the pairs of all groups.
        num_tokens: T, which is also the index of the padding row.
    """
    order, row = runs.new_empty(num_computed), runs.new_empty(num_computed)
    yield order, row
    num_own, num_runs = own.shape[0], runs.shape[0] // 3 - num_sources
    sizes = (num_own, num_own + arrived.shape[0], num_runs, num_sources, num_tokens, num_computed, num_runs.bit_length())
    grid = (triton.cdiv(num_computed, BLOCK),)
    launch(arrive_kernel, grid, own, arrived, runs, order, row, *sizes, BLOCK=BLOCK)
