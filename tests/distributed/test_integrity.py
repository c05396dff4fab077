"""Checked exchanges on real ranks find each fault in the transport and name its source. 1,000 undamaged routings raise
no error."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll, Pending, Splits
from moe_dist.comm.collectives import CommStats
from moe_dist.comm.integrity import CheckedAllToAll
from moe_dist.comm.names import BACKWARD, DISPATCH_ROWS
from moe_dist.errors import IntegrityError
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.exchange import Exchange, ExchangePlan
from moe_dist.parallel.mesh import make_mesh
from tests.support.cover import exhaustive, full
from tests.support.routings import random_case, round_trip
from tests.support.worlds import RankContext

KINDS = ("dropped", "duplicated", "swapped", "flipped")
DTYPES = (torch.float32, torch.bfloat16, torch.int64)
NAMES = (DISPATCH_ROWS, DISPATCH_ROWS + BACKWARD)
TRIALS = 96  # for each world size, four trials for each damage, dtype and exchange


class FaultyWire(AllToAll):
    """A transport that damages the received rows of one named exchange."""

    damage: tuple[str, Callable[[torch.Tensor], None]] | None = None

    def start(self, items: torch.Tensor, splits: Splits, *, name: str, **options: Any) -> Pending:
        pending = super().start(items, splits, name=name, **options)
        if self.damage is not None and self.damage[0] == name:
            wait, damage = pending.wait, self.damage[1]

            def damaged() -> torch.Tensor:
                received = wait()
                damage(received)
                return received

            pending.wait = damaged
        return pending


def break_rows(rows: torch.Tensor, kind: str, rng: np.random.Generator) -> None:
    """Damages the rows of one source in place. The rows are random, so that no two are equal."""
    count, before = len(rows), rows.clone()
    at = int(rng.integers(0, count))
    if kind == "dropped":
        rows[at:-1] = before[at + 1 :]
        rows[-1] = 0
    elif kind == "duplicated":
        at = int(rng.integers(0, count - 1))
        rows[at + 1 :] = before[at:-1]
    elif kind == "swapped":
        one, two = rng.choice(count, 2, replace=False).tolist()
        rows[one], rows[two] = before[two], before[one]
    else:
        bits = rows[at : at + 1].view(torch.uint8).flatten()  # a view of contiguous rows
        bits[int(rng.integers(0, len(bits)))] ^= 1 << int(rng.integers(0, 8))
    assert not torch.equal(before.view(torch.uint8), rows.view(torch.uint8))


def trials(rank: RankContext, count: int) -> list[tuple[str, str]]:
    """Runs `count` exchanges, each with damaged rows from one source on one rank. The damaged rank must raise an error,
    and the others must not. Returns the expected and the actual error of each exchange on this rank."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    transport = FaultyWire(mesh.ep, CommStats())
    wire, found = CheckedAllToAll(transport), []
    for trial in range(count):
        rng = np.random.default_rng([trial, rank.world_size])  # equal on all ranks
        kind, dtype, name = KINDS[trial % 4], DTYPES[trial // 4 % 3], NAMES[trial // 12 % 2]
        sizes = rng.integers(0, 9, (rank.world_size, rank.world_size)) * (1 - np.eye(rank.world_size, dtype=np.int64))
        victim, source = rng.choice(rank.world_size, 2, replace=False).tolist()
        sizes[source, victim] = max(2, sizes[source, victim])
        splits = Splits(tuple(sizes[rank.rank].tolist()), tuple(sizes[:, rank.rank].tolist()))
        begin = sum(splits.receive[:source])
        part = slice(begin, begin + splits.receive[source])
        transport.damage = None
        if victim == rank.rank:
            transport.damage = (name, lambda got, p=part, k=kind, r=rng: break_rows(got[p], k, r))
        wanted = f"'{name}' of layers.5 from rank {source} to rank {victim}: row" if victim == rank.rank else ""
        try:
            _exchange(wire, splits, dtype, name, seed=trial * 10 + rank.rank)
            found.append((wanted, ""))
        except IntegrityError as error:
            found.append((wanted, str(error)))
    return found


def _exchange(wire: AllToAll, splits: Splits, dtype: torch.dtype, name: str, *, seed: int) -> None:
    """Runs a dispatch and its backward if the dtype is a float, or one direct exchange if it is an integer."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        rows = torch.randint(-(1 << 62), 1 << 62, (sum(splits.send),), generator=generator)
        wire.exchange(rows, splits, name=name, layer="layers.5")
        return
    rows = torch.randn(sum(splits.send), 5, generator=generator).to(dtype)
    weights = torch.rand(sum(splits.send), generator=generator)
    if name == DISPATCH_ROWS:
        Exchange(wire).dispatch(rows, weights, _plan(splits))
        return
    rows, weights = rows.requires_grad_(), weights.requires_grad_()
    back = splits.reversed()  # so that the gradients have the sizes of `splits`
    shape = (sum(back.send), 5)
    leaves = torch.zeros(shape, dtype=dtype).requires_grad_(), torch.zeros(shape[0]).requires_grad_()
    got, got_weights = Exchange(wire).dispatch(*leaves, _plan(back))
    torch.autograd.backward([got, got_weights], [rows.detach(), weights.detach()])


def _plan(splits: Splits) -> ExchangePlan:
    """Returns the plan of an exchange that sends all rows to other ranks in order, each row with a weight."""
    every, none = torch.arange(sum(splits.send)), torch.zeros(0, dtype=torch.int64)
    return ExchangePlan("layers.5", "", "", len(every), splits, splits, every, none, every, None)


@pytest.mark.parametrize("world_size", [2, full(4)])
def test_each_kind_of_damage_is_found_and_named(run_in_world: Callable[..., list[Any]], world_size: int) -> None:
    injected = 0
    for findings in run_in_world(world_size, trials, TRIALS):
        for wanted, found in findings:
            injected += wanted != ""
            assert (wanted == "") == (found == ""), f"injected {wanted!r}, found {found!r}"
            assert found.startswith(wanted)
    assert injected == TRIALS


def pairs_of_disagreement(rank: RankContext, change: str) -> str:
    """The two ranks start exchanges of different sizes. The check must raise an error before a rank sends, because the send
    would hang. Returns the error."""
    mesh = make_mesh(ep=2, device=torch.device("cpu"), timeout=600.0)
    transport = AllToAll(mesh.ep, CommStats(events=[]))
    odd = rank.rank == 1
    count = change == "count"  # each rank sends one row more than the other expects
    splits = Splits((4 if odd else 0, 0 if odd else 3), (3 + count if odd else 0, 0 if odd else 4 + count))
    rows = torch.ones(sum(splits.send), 3 if odd and change == "width" else 2)
    layer = "layers.1" if odd and change == "call" else "layers.0"
    message = ""
    try:
        CheckedAllToAll(transport).start(rows, splits, name="rows", layer=layer)
    except IntegrityError as error:
        message = str(error)
    assert transport.comm_stats.events is not None
    return message or f"sent {len(transport.comm_stats.events)}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("count", "from rank 1 to rank 0: 4 rows of 8 bytes are sent, 5 of 8 expected"),
        ("width", "from rank 1 to rank 0: 4 rows of 12 bytes are sent, 4 of 8 expected"),
        ("call", "from rank 1 to rank 0: that rank is in another exchange"),
    ],
)
def test_ranks_that_disagree_are_told_before_the_exchange(
    run_in_world: Callable[..., list[Any]], change: str, said: str
) -> None:
    first, second = run_in_world(2, pairs_of_disagreement, change)
    assert said in first
    assert "from rank 0 to rank 1" in second


def clean_routings(rank: RankContext, seeds: range) -> int:
    """Returns the number of checked exchanges in round trips without damage. Rows of three bf16 numbers do not fill the
    checksum's words."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    comm_stats, checked = CommStats(events=[]), 0
    wire = CheckedAllToAll(AllToAll(mesh.ep, comm_stats))
    for seed in seeds:
        case = random_case(seed, rank.world_size)
        chosen, dispatcher = case.experts_TK[rank.rank], AllToAllDispatcher(DispatchContext(case.placement, wire))
        assignments = case.assignments(rank.rank, torch.empty(chosen.size))
        dtype, tolerance = ((torch.bfloat16, 1.0), (torch.double, 1e-12))[seed % 2]
        options: dict[str, Any] = {"comm_stats": comm_stats, "seed": seed, "dtype": dtype, "tolerance": tolerance}
        round_trip(dispatcher, assignments, case.placement, rank.rank, len(chosen), **options)
        checked += sum(event.startswith("checksums of") for event in comm_stats.events or [])
    return checked


@pytest.mark.parametrize(("world_size", "seeds"), [full(2, range(60)), (4, range(16)), exhaustive(4, range(16, 940))])
def test_a_thousand_clean_routings_are_not_blamed(
    run_in_world: Callable[..., list[Any]], world_size: int, seeds: range
) -> None:
    checked = run_in_world(world_size, clean_routings, seeds)
    assert checked == [8 * len(seeds)] * world_size  # forward has five exchanges, and backward has three
