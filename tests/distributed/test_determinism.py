"""With `parallel.deterministic`, torch is in deterministic mode, and two runs with several threads are bit-equal."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.parallel.determinism import make_deterministic
from moe_dist.train.objective.loss import AuxSettings
from tests.support.cover import full
from tests.support.layouts import Layout, TrainingRank, batch_of
from tests.support.worlds import RankContext

STEPS = 5


@contextmanager
def switched_on(threads: int) -> Iterator[None]:
    """Turns deterministic mode on and sets the number of threads. Restores both settings, because other tests use the
    same processes."""
    before, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(threads)
    make_deterministic()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def trained(rank: RankContext, layout: Layout, threads: int) -> str:
    """Returns a hash of this rank's losses, gradient norms and parameters after each step."""
    with switched_on(threads):
        training, digest = TrainingRank(layout), hashlib.sha256()
        for number in range(STEPS):
            batches = [batch_of(number, 0, 2 + 2 * rank.rank, 2)]
            result = training.step(batches, lr=1e-2, aux=AuxSettings("null_averaged", 0.02, 1e-3))
            digest.update(result.nll_M.tobytes() + np.float64(result.grad_norm).tobytes())
            for name, value in sorted(training.logical().items()):
                digest.update(name.encode() + value.tobytes())
        return digest.hexdigest()


@pytest.mark.parametrize(("data", "threads"), [full("ddp", 1), full("ddp", 4), full("fsdp2", 1), ("fsdp2", 4)])
def test_two_runs_have_the_same_bits(run_in_world: Callable[..., list[Any]], data: str, threads: int) -> None:
    layout = Layout(2, 1, "pinned", data, precision="float32")
    first = run_in_world(2, trained, layout, threads)
    assert run_in_world(2, trained, layout, threads) == first
    assert first[0] != first[1]  # the ranks' hashes differ, because each rank has different experts


def repeated_write(_rank: RankContext) -> tuple[str, bool]:
    """Writes two values to one element, which has no defined order, first in normal and then in deterministic mode."""

    def write() -> None:
        torch.zeros(3).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))

    write()
    with switched_on(1):
        filled = bool(torch.utils.deterministic.fill_uninitialized_memory)
        try:
            write()
        except RuntimeError as error:
            return str(error), filled
    return "", filled


def test_an_operation_of_chance_raises(run_in_world: Callable[..., list[Any]]) -> None:
    for message, filled in run_in_world(2, repeated_write):
        assert "does not have a deterministic implementation" in message
        assert not filled
