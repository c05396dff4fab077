"""Makes the plans of the dispatch methods `all_to_all` and `pipelined`. A plan describes which rows and which (token,
expert) pairs go to which rank. A row is the hidden state of a token; a token has one row for each destination rank. Making
a layer's plan needs one host sync.

The tokens are divided into ranges of equal length, the chunks. (token, expert) pairs are sorted by (chunk, rank, slot), and
rows by (chunk, rank, token). This rank is last in both orders. A slot is the index of an expert on its rank. The pairs
received from a rank are thus grouped by slot, so the receiver need not sort them. A pair is sent as one number: the index
of its row among the rows to the same rank. The pair's slot follows from the counts.

Shape letters: T tokens, N pairs (absent pairs included), E experts, W ranks, C chunks, P taken pairs, S rows sent to other
ranks, O rows that stay, Q pairs computed here, X counts per rank and chunk (the rows, then the pairs of each slot), H ranks
(the own rank, then the other ranks in order).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll, Pending, Splits, split_sizes
from moe_dist.comm.collectives import from_host
from moe_dist.comm.names import COUNTS, PAIR_ROWS
from moe_dist.errors import ResourceError
from moe_dist.moe.dispatch.exchange import AllToAllPlan
from moe_dist.moe.kernels.torch_kernels import counting_order
from moe_dist.moe.routing.types import ABSENT, Assignments
from moe_dist.placement.placement import ExpertPlacement

SPLIT_SIZES = "split sizes"  # name in CommStats of a layer's only host sync


@dataclass(frozen=True)
class OwnPairs:
    """The pairs of this rank's tokens with this rank's experts, if these pairs are computed outside of the chunks. A pair's
    row is the hidden state of its token.

    Attributes:
        pair_P: int64, index of each pair in the assignments, sorted by slot.
        row_of_pair_Q, slot_counts: See `PairLayout`.
    """

    pair_P: Tensor
    row_of_pair_Q: Tensor
    slot_counts: tuple[int, ...]


def check_receive_rows(rows: int, limit: int | None, position: int, place: str) -> None:
    """Raises a ResourceError if more rows than `parallel.max_receive_rows` would arrive at an EP position."""
    if limit is not None and rows > limit:
        raise ResourceError(
            f"EP position {position} would receive {rows} rows in {place}, more than parallel.max_receive_rows={limit}; "
            "raise it if memory allows, lower train.micro_batch or the experts' capacity, or raise loss.balance so that "
            "tokens spread (docs/routing.md)"
        )


@dataclass(frozen=True)
class _Tables:
    """The placement as tensors on one device. The last entries of `place_E` and `bin_E` are for absent pairs (expert -1).

    Attributes:
        place_E: Index of each expert's rank in the order of sending (other ranks, then this rank); W for absent pairs.
        bin_E: Index of each expert in the order of (place of the expert's rank, slot); E for absent pairs.
        message_M: For each count to send, in the order of ranks, its index in the list of all row counts and pair counts.
    """

    place_E: Tensor
    bin_E: Tensor
    message_M: Tensor
    one: Tensor


@dataclass(frozen=True)
class ExchangeSizes:
    """The numbers of rows and pairs to and from each other rank, and the numbers that stay on this rank, on the host."""

    rows: Splits
    pairs: Splits
    own_rows: int
    own_pairs: int

    @classmethod
    def of(cls, own: int, sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]]) -> "ExchangeSizes":
        """Makes the sizes from the numbers of (rows, pairs) to each rank and from each rank. `own` is this rank's index."""
        (rows_out, pairs_out), (rows_in, pairs_in) = zip(*sent, strict=True), zip(*received, strict=True)
        rows = Splits(split_sizes(rows_out, own), split_sizes(rows_in, own))
        pairs = Splits(split_sizes(pairs_out, own), split_sizes(pairs_in, own))
        return cls(rows, pairs, rows_out[own], pairs_out[own])


@dataclass(frozen=True)
class Counts:
    """The exchanged counts of all chunks, on the host.

    Attributes:
        slot_counts: For each chunk, the number of pairs that each of this rank's slots computes.
        own_slot_counts: Number of own pairs of each slot in chunk 0. With `own_apart`, chunk 0 has all own pairs.
        arriving_WCX: The number of rows and the number of pairs of each slot that arrive from each rank.
    """

    sizes: list[ExchangeSizes]
    slot_counts: list[tuple[int, ...]]
    own_slot_counts: tuple[int, ...]
    arriving_WCX: np.ndarray

    @property
    def num_remote_pairs(self) -> int:
        return sum(sum(each.pairs.send) for each in self.sizes)


@dataclass(frozen=True)
class _Cells:
    """The bins of pairs and the runs of rows, before the host sync. A bin has the pairs of one (chunk, rank, slot). A run
    has the rows of one (chunk, rank).

    Attributes:
        bin_N: Bin of each pair; the last bin takes absent pairs.
        run_N: Run that contains the row of each pair.
        index_N: Index of each pair's row inside the run.
    """

    bin_N: Tensor
    run_N: Tensor
    index_N: Tensor
    row_counts: Tensor
    pair_counts: Tensor


class DispatchPlanner:
    """Makes this rank's plans for one EP group and `chunks` ranges of tokens. With `own_apart`, the pairs of this rank's
    tokens with this rank's experts are computed outside of the chunks."""

    def __init__(
        self,
        placement: ExpertPlacement,
        wire: AllToAll,
        *,
        max_receive_rows: int | None = None,
        chunks: int = 1,
        own_apart: bool = False,
    ) -> None:
        self.placement, self.wire, self.max_receive_rows = placement, wire, max_receive_rows
        self.chunks, self.own_apart = chunks, own_apart
        self._tables_on = cache(self._make_tables)

    def chunk_lengths(self, num_tokens: int) -> tuple[int, ...]:
        """Returns the number of tokens of each chunk: equal numbers, then the remainder, then 0."""
        length = self._chunk_length(num_tokens)
        return tuple(max(0, min(num_tokens - chunk * length, length)) for chunk in range(self.chunks))

    def plan(self, assignments: Assignments, num_tokens: int, layer: str) -> tuple[tuple[AllToAllPlan, ...], OwnPairs]:
        """Returns a plan for each chunk, and the own pairs (empty without `own_apart`). See `AllToAllDispatcher.plan`."""
        tables = self._tables_on(assignments.expert_N.device)
        cells = self._cells(assignments, num_tokens, tables)
        order_N = counting_order(cells.bin_N, self.chunks * self.placement.num_experts + 1)  # queued before the host sync
        message = torch.cat([cells.row_counts, cells.pair_counts])[tables.message_M]
        counts = self._exchange_counts(message, layer)  # the layer's host sync
        num_remote = counts.num_remote_pairs
        pair_P = order_N[: num_remote + sum(each.own_pairs for each in counts.sizes)]
        index_P, token_P = cells.index_N[pair_P], assignments.token_N[pair_P]
        indices = self._start_indices(index_P[:num_remote], counts, layer)
        first, runs = self._runs(counts, pair_P.device)
        tokens_of_rows = self._tokens_of_rows(token_P, cells.run_N[pair_P], index_P, first, counts, num_tokens)
        pairs, indices = self._by_chunk(pair_P, index_P, indices.wait(), counts)
        mine = slice(0, 0) if self.own_apart else slice(None)
        plans = []
        for chunk, length in enumerate(self.chunk_lengths(num_tokens)):
            order_Q, row_Q = _by_slot(indices[chunk], runs[chunk])
            plans.append(
                AllToAllPlan(
                    layer=layer,
                    prefix="",
                    suffix=f" {chunk}" if self.chunks > 1 else "",
                    table_rows=length,
                    rows=counts.sizes[chunk].rows,
                    pairs=counts.sizes[chunk].pairs,
                    pair_P=pairs[chunk],
                    row_S=tokens_of_rows[chunk],
                    row_O=tokens_of_rows[self.chunks + chunk][mine],
                    order_Q=order_Q,
                    row_of_pair_Q=row_Q,
                    slot_counts=counts.slot_counts[chunk],
                )
            )
        own = OwnPairs(pair_P[:0], token_P[:0], ())
        if self.own_apart:
            own = OwnPairs(pair_P[num_remote:], token_P[num_remote:], counts.own_slot_counts)
        return tuple(plans), own

    @property
    def _ranks(self) -> range:
        return range(self.wire.size)

    def _chunk_length(self, num_tokens: int) -> int:
        return max(1, -(-num_tokens // self.chunks))

    def _cells(self, assignments: Assignments, num_tokens: int, tables: _Tables) -> _Cells:
        """Counts the pairs of each bin and the rows of each run. Uses a bitmap (run, token) of W x T x 5 bytes. Does not
        sync."""
        size, chunks, length = self.wire.size, self.chunks, self._chunk_length(num_tokens)
        num_remote = self.placement.num_experts - len(self.placement.slots[self.wire.rank])
        num_own = self.placement.num_experts - num_remote
        expert_N, token_N = assignments.expert_N, assignments.token_N
        bin_N, place_N = tables.bin_E[expert_N], tables.place_E[expert_N]  # expert -1 (absent) reads the last entry
        run_N = place_N
        if chunks > 1:
            chunk_N, own_N = token_N // length, place_N == size - 1
            token_N = token_N - chunk_N * length
            run_N = torch.where(own_N, chunks * (size - 1) + chunk_N, chunk_N * (size - 1) + place_N)
            own_chunk_N = 0 if self.own_apart else chunk_N
            own_bin_N = (chunks - 1) * num_remote + own_chunk_N * num_own + bin_N
            bin_N = torch.where(own_N, own_bin_N, chunk_N * num_remote + bin_N)
            absent_N = expert_N == ABSENT
            bin_N = bin_N.masked_fill(absent_N, chunks * self.placement.num_experts)
            run_N = run_N.masked_fill(absent_N, chunks * size)
        cell_N = torch.add(token_N, run_N, alpha=length)
        # the last run has the cells of absent pairs, which are never read
        present = torch.zeros((chunks * size + 1) * length, dtype=torch.uint8, device=cell_N.device).scatter_(0, cell_N, 1)
        index = present.view(-1, length).cumsum(1, dtype=torch.int32)
        pair_counts = torch.zeros(chunks * self.placement.num_experts + 1, dtype=torch.int64, device=cell_N.device)
        pair_counts.scatter_add_(0, bin_N, tables.one.expand_as(bin_N))
        return _Cells(
            bin_N=bin_N,
            run_N=run_N,
            index_N=index.view(-1)[cell_N] - 1,  # the cumulative count includes the row itself
            row_counts=index[:-1, -1].to(torch.int64),
            pair_counts=pair_counts[:-1],
        )

    def _exchange_counts(self, message: Tensor, layer: str) -> Counts:
        """Exchanges the counts with all ranks, and reads the sizes of all chunks in the layer's only host sync. Raises
        ResourceError if more rows than `max_receive_rows` would arrive."""
        own, size, chunks, comm_stats = self.wire.rank, self.wire.size, self.chunks, self.wire.comm_stats
        lengths = [chunks * (1 + len(slots)) for slots in self.placement.slots]
        if self.wire.group is None:  # a single rank receives its own counts
            sent_values = received_values = comm_stats.to_host(SPLIT_SIZES, message)
        else:
            splits = Splits(send=tuple(lengths), receive=(lengths[own],) * size)
            received = self.wire.exchange(message, splits, name=COUNTS, layer=layer)
            values = comm_stats.to_host(SPLIT_SIZES, torch.cat([message, received]))  # one copy costs one sync
            sent_values, received_values = values[: message.shape[0]], values[message.shape[0] :]
        # a list of arrays [C, X], because X depends on the rank's number of slots
        sent = [np.reshape(each, (chunks, -1)) for each in np.split(sent_values, np.cumsum(lengths)[:-1])]
        arriving_WCX = np.reshape(received_values, (size, chunks, -1))
        computed_CX = arriving_WCX.sum(0) - (arriving_WCX[own] if self.own_apart else 0)
        sizes = [
            ExchangeSizes.of(
                own,
                [(int(x[c, 0]), int(x[c, 1:].sum())) for x in sent],
                [(int(x[c, 0]), int(x[c, 1:].sum())) for x in arriving_WCX],
            )
            for c in range(chunks)
        ]
        check_receive_rows(sum(sum(each.rows.receive) for each in sizes), self.max_receive_rows, own, "one layer")
        return Counts(
            sizes,
            [tuple(row[1:].tolist()) for row in computed_CX],
            tuple(arriving_WCX[own, 0, 1:].tolist()),
            arriving_WCX,
        )

    def _runs(self, counts: Counts, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Returns the index of the first row of each run of rows to send, and for each chunk an array [3, runs]. A run of
        this array has the pairs of one slot from one source rank. These runs are sorted by slot. The three numbers of a run
        are its length, its first pair's index in the order of arrival minus this pair's index in the order of slots, and
        the index of the source rank's first row. One copy from the host brings all results to the device."""
        own, holders = self.wire.rank, [] if self.own_apart else [self.wire.rank]
        holders += [rank for rank in self._ranks if rank != own]
        row_counts = [each.rows.send[rank] for each in counts.sizes for rank in self._ranks if rank != own]
        tables = [starts_of(np.array(row_counts + [each.own_rows for each in counts.sizes], dtype=np.int64))]
        for chunk in range(self.chunks):
            arriving_HX = counts.arriving_WCX[holders, chunk]
            pairs_HX, row_H = arriving_HX[:, 1:], starts_of(arriving_HX[:, 0])
            first_HX, length_X = starts_of(pairs_HX.reshape(-1)).reshape(pairs_HX.shape), pairs_HX.T.reshape(-1)
            shift_X = first_HX.T.reshape(-1) - starts_of(length_X)
            tables.append(np.concatenate([length_X, shift_X, np.tile(row_H, pairs_HX.shape[1])]))
        first, *runs = from_host(np.concatenate(tables), torch.int64, device).split([len(each) for each in tables])
        return first, [each.view(3, len(each) // 3) for each in runs]

    def _start_indices(self, index_P: Tensor, counts: Counts, layer: str) -> Pending:
        """Starts to send each pair's row index to the rank of the pair's expert. All chunks use one collective."""
        sizes = [each.pairs for each in counts.sizes]
        pieces = _pieces(index_P, [each.send for each in sizes])
        splits = Splits(
            tuple(sum(each.send[rank] for each in sizes) for rank in self._ranks),
            tuple(sum(each.receive[rank] for each in sizes) for rank in self._ranks),
        )
        # reorders from (chunk, rank) to (rank, chunk)
        items = index_P if self.chunks == 1 else torch.cat([pieces[c][r] for r in self._ranks for c in range(self.chunks)])
        return self.wire.start(items, splits, name=PAIR_ROWS, layer=layer)

    def _by_chunk(
        self, pair_P: Tensor, index_P: Tensor, arrived: Tensor, counts: Counts
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns two lists with a tensor for each chunk: the taken pairs of this rank's tokens (pairs for other ranks,
        then own pairs), and the row indices of the pairs computed here (own pairs, then received pairs)."""
        chunks, mine = range(self.chunks), slice(0, 0) if self.own_apart else slice(None)
        sizes = [sum(each.pairs.send) for each in counts.sizes] + [each.own_pairs for each in counts.sizes]
        pair, index = pair_P.split(sizes), index_P.split(sizes)
        received = _pieces(arrived, [[each.pairs.receive[r] for each in counts.sizes] for r in self._ranks])
        whole = self.chunks == 1 and not self.own_apart  # true if `pair_P` is already in this order
        pairs = [pair_P] if whole else [torch.cat([pair[c], pair[self.chunks + c][mine]]) for c in chunks]
        indices = [torch.cat([index[self.chunks + c][mine], *(pieces[c] for pieces in received)]) for c in chunks]
        return pairs, [each.to(torch.int64) for each in indices]  # indices are sent as int32

    def _tokens_of_rows(
        self, token_P: Tensor, run_P: Tensor, index_P: Tensor, first: Tensor, counts: Counts, num_tokens: int
    ) -> tuple[Tensor, ...]:
        """Returns the token of each row: first for each chunk the rows to other ranks, then for each chunk the own rows.
        Tokens are numbered from the first token of their chunk."""
        remote, own = [sum(each.rows.send) for each in counts.sizes], [each.own_rows for each in counts.sizes]
        tokens = token_P.new_empty(sum(remote) + sum(own))
        if self.chunks > 1:
            token_P = token_P % self._chunk_length(num_tokens)
        # All pairs of a row write the same token, so the order of writes does not matter.
        return tokens.scatter_(0, first[run_P] + index_P, token_P).split([*remote, *own])

    def _make_tables(self, device: torch.device) -> _Tables:
        """Makes the tables of the placement on a device. The result is cached."""
        if self.wire.size != self.placement.num_ranks:
            raise AssertionError(f"the wire joins {self.wire.size} ranks, the placement has {self.placement.num_ranks}")
        slots, own, size, chunks = self.placement.slots, self.wire.rank, self.wire.size, self.chunks
        order = [rank for rank in range(size) if rank != own] + [own]
        place_of = {rank: place for place, rank in enumerate(order)}
        experts = [expert for rank in order for expert in slots[rank]]
        bin_of = {expert: position for position, expert in enumerate(experts)}
        num_remote = len(experts) - len(slots[own])
        message = []
        for rank in range(size):
            for chunk in range(chunks):
                if rank == own:
                    row, shift = chunks * (size - 1) + chunk, (chunks - 1) * num_remote + chunk * len(slots[own])
                else:
                    row, shift = chunk * (size - 1) + place_of[rank], chunk * num_remote
                message += [row, *(chunks * size + shift + bin_of[expert] for expert in slots[rank])]
        ranks = self.placement.rank_of_expert
        return _Tables(
            place_E=torch.tensor([*(place_of[rank] for rank in ranks), size], device=device),
            bin_E=torch.tensor([*(bin_of[expert] for expert in range(len(ranks))), len(ranks)], device=device),
            message_M=torch.tensor(message, device=device),
            one=torch.ones((), dtype=torch.int64, device=device),
        )


def _by_slot(index_Q: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns order_Q and row_of_pair_Q of the pairs computed here, which arrive sorted by (rank, slot). `index_Q` has each
    pair's row index among the rows of its source rank. `DispatchPlanner._runs` returns `runs`."""
    length_X, shift_X, row_X = runs
    run_Q = torch.repeat_interleave(length_X, output_size=index_Q.shape[0])
    order_Q = shift_X.index_select(0, run_Q) + torch.arange(len(run_Q), device=run_Q.device)
    return order_Q, index_Q.index_select(0, order_Q) + row_X.index_select(0, run_Q)


def starts_of(length_X: np.ndarray) -> np.ndarray:
    """Returns the start of each block, which is the sum of the lengths of all previous blocks."""
    return length_X.cumsum() - length_X


def _pieces(items: Tensor, sizes: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """Splits `items` into consecutive pieces of the given sizes. Returns nested lists in the shape of `sizes`."""
    cut = iter(items.split([size for row in sizes for size in row]))
    return [[next(cut) for _ in row] for row in sizes]
