"""Implements an all-to-all for debugging, which detects rows that were lost, doubled, swapped or changed on the way.

For each exchange of rows, all ranks exchange metadata twice, in the same order on every rank:

    before      each rank tells each rank the number of rows, the bytes per row, and a hash of the exchange's name. If
                sender and receiver differ, the receiver raises an error instead of hanging in the exchange.
    after       each rank sends the checksums of its rows. The receiver compares these checksums with its own sums of the
                arrived rows.

A row's checksum is an integer, namely the sum of two terms modulo 2^61 - 1. The content term is the sum of the row's 32-bit
words, each multiplied by an odd 15-bit weight, so that a changed word changes the term. The place term depends on the row's
position in its slice, on its source rank and on its destination rank, so that lost, doubled or swapped rows are detected.
Shape
letters: N rows, B bytes of a row, W words.

A rank that finds an error raises it, and enters no further collective. When this rank exits, its connections close, and the
launcher ends the other ranks. The ranks do not exchange the error, because after a damaged exchange no collective can be
trusted.
"""

import math
import zlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll, Pending, Splits
from moe_dist.errors import IntegrityError

MODULUS = (1 << 61) - 1
# Large odd factors of the place term. The products of these factors with positions and ranks stay below 2^63.
POSITION, SOURCE, DESTINATION = 1_000_003, 1_000_000_007, 998_244_353
WEIGHT_BITS = 15
MAX_ROW_BYTES = 4 << 16  # with larger rows the content term, up to words x 2^31 x 2^15, could overflow int64


def content_sums(rows: Tensor) -> Tensor:
    """Returns each row's content term, int64 [N]. The result is the same on all devices. Rows may have any shape and dtype.

    Costs about two passes over the rows, and 8 bytes of memory per 32-bit word.
    """
    num_rows = rows.shape[0]
    if rows.numel() == 0:
        return torch.zeros(num_rows, dtype=torch.int64, device=rows.device)
    bytes_NB = rows.detach().reshape(num_rows, -1).contiguous().view(torch.uint8)
    if bytes_NB.shape[1] > MAX_ROW_BYTES:
        raise AssertionError(f"rows of {bytes_NB.shape[1]} bytes are too long to sum exactly")
    bytes_NB = F.pad(bytes_NB, (0, -bytes_NB.shape[1] % 4))
    words_NW = bytes_NB.contiguous().view(torch.int32)
    index_W = torch.arange(words_NW.shape[1], device=rows.device)
    weight_W = ((index_W * 40_503) & ((1 << WEIGHT_BITS) - 1)) | 1  # odd weights, so that a changed word changes the sum
    return (words_NW * weight_W).sum(1)


def position_terms(splits: tuple[int, ...], *, own: int, sending: bool, device: torch.device) -> Tensor:
    """Returns the place term of each row, int64 [N], from its index in its slice and from its source and destination ranks.
    `splits` has the number of rows for each destination rank if `sending` is True, else for each source rank."""
    terms = []
    for peer, count in enumerate(splits):
        source, destination = (own, peer) if sending else (peer, own)
        start = SOURCE * (source + 1) + DESTINATION * (destination + 1)
        terms.append(torch.arange(count, device=device) * POSITION + start)
    return torch.cat(terms)


class CheckedAllToAll(AllToAll):
    """An all-to-all that sends its rows through another `AllToAll`, the `transport`, and checks the rows that arrive.

    Each exchange of rows costs two exchanges of metadata, two host syncs and some passes over the rows. The checks
    change neither the bits of the rows nor the order of their exchanges.
    """

    def __init__(self, transport: AllToAll) -> None:
        super().__init__(transport.group, transport.comm_stats, transport.tracker)
        self.transport = transport

    def start(
        self, items: Tensor, splits: Splits, *, name: str, layer: str = "", payload: bool = False, out: Tensor | None = None
    ) -> Pending:
        """Works like `AllToAll.start`. First all ranks compare the numbers and sizes of their rows, then the exchanges of
        rows and of checksums start. Raises IntegrityError before any row is sent if sender and receiver disagree about the
        exchange or its sizes."""
        transport = self.transport
        if self.group is None:
            return transport.start(items, splits, name=name, layer=layer, payload=payload, out=out)
        place = position_terms(splits.send, own=self.rank, sending=True, device=items.device)
        sums = (content_sums(items) % MODULUS + place) % MODULUS  # checksums of the rows before the exchange
        self._announce(items, splits, name=name, layer=layer)
        rows = transport.start(items, splits, name=name, layer=layer, payload=payload, out=out)
        checks = transport.start(sums, splits, name=f"checksums of {name}", layer=layer)
        return _Checked(self, rows, checks)

    def _announce(self, items: Tensor, splits: Splits, *, name: str, layer: str) -> None:
        """Compares numbers of rows, bytes per row and the hash of the exchange's name on all ranks. Costs one host sync."""
        tag, width = zlib.crc32(f"{layer}/{name}".encode()), math.prod(items.shape[1:]) * items.element_size()
        mine = torch.tensor([[count, width, tag] for count in splits.send], device=items.device)
        one_each = Splits((1,) * self.size, (1,) * self.size)
        theirs = self.transport.exchange(mine, one_each, name=f"announcement of {name}", layer=layer).tolist()  # host sync
        for source, (count, their_width, their_tag) in enumerate(theirs):
            where = self._where(name, layer, source)
            if their_tag != tag:
                raise IntegrityError(
                    f"{where}: that rank is in another exchange; the ranks do not call the same ones in the same order"
                )
            if (count, their_width) != (splits.receive[source], width):
                raise IntegrityError(
                    f"{where}: {count} rows of {their_width} bytes are sent, {splits.receive[source]} of {width} expected"
                )

    def verify(self, received: Tensor, checks: Tensor, rows: Pending) -> None:
        """Compares the received rows with their checksums. Costs one host sync. Raises IntegrityError if a row differs from
        its checksum. The error names the layer, the ranks and the first damaged rows."""
        place = position_terms(rows.splits.receive, own=self.rank, sending=False, device=received.device)
        content = content_sums(received) % MODULUS
        wrong = checks != (content + place) % MODULUS
        if not wrong.any():  # host sync
            return
        sent = (checks - place) % MODULUS
        at = 0
        for source, count in enumerate(rows.splits.receive):
            part = slice(at, at + count)
            at += count
            if wrong[part].any():
                problem = _damage(wrong[part], content[part], sent[part])
                raise IntegrityError(f"{self._where(rows.name, rows.layer, source)}: {problem}")

    def _where(self, name: str, layer: str, source: int) -> str:
        ranks = dist.get_process_group_ranks(self.group)
        of = f" of {layer}" if layer else ""
        return f"'{name}'{of} from rank {ranks[source]} to rank {ranks[self.rank]}"


class _Checked(Pending):
    """An exchange of rows and the exchange of their checksums, both in flight."""

    def __init__(self, checked: CheckedAllToAll, rows: Pending, checks: Pending) -> None:
        super().__init__(rows.wire, rows.layer, rows.name, rows.splits, rows.received)
        self._checked, self._rows, self._checks = checked, rows, checks

    def wait(self) -> Tensor:
        received = self._rows.wait()
        self._checked.verify(received, self._checks.wait(), self._rows)
        return received


def _damage(wrong: Tensor, content: Tensor, sent: Tensor) -> str:
    """Describes the damage to the rows that came from one rank; `wrong` marks the damaged rows. `sent` has the content
    terms that the sender computed, `content` those that the receiver computed."""
    rows = wrong.nonzero().flatten().tolist()  # host sync, only if there is damage
    came_from = {value: index for index, value in enumerate(sent.tolist())}
    arrived = content.tolist()
    damages = []
    for row in rows[:4]:
        origin = came_from.get(arrived[row])
        damages.append(f"row {row} " + ("was changed" if origin is None else f"holds what was sent as row {origin}"))
    more = f"; {len(rows)} of {len(wrong)} rows differ" if len(rows) > 4 else ""
    return ", ".join(damages) + more
