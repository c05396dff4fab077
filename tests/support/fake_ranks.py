"""Checkpoints of many ranks in one process: each fake rank is a thread with its own plain tensors, as under DDP."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_dist.checkpoint.collective_status import CollectiveStatus
from moe_dist.checkpoint.manager import CheckpointManager, Restored
from moe_dist.checkpoint.state import CheckpointState


class FakeStatus(CollectiveStatus):
    """Sums numbers over threads instead of processes."""

    def __init__(self, rank: int, world_size: int, shared: "Shared") -> None:
        super().__init__("a fake world", None)
        self.rank, self.world_size, self._shared = rank, world_size, shared

    def add(self, numbers: list[int], name: str = "") -> list[int]:
        return self._shared.add(self.rank, numbers)


class Shared:
    """Adds up the numbers of all threads."""

    def __init__(self, world_size: int) -> None:
        self._meet = threading.Barrier(world_size, timeout=600)
        self._brought: dict[int, list[int]] = {}

    def add(self, rank: int, numbers: list[int]) -> list[int]:
        self._brought[rank] = numbers
        self._meet.wait()
        total = [(sum(column) + (1 << 63)) % (1 << 64) - (1 << 63) for column in zip(*self._brought.values(), strict=True)]
        self._meet.wait()
        return total


def on_all(
    states: Sequence[CheckpointState], folder: Path, act: Callable[[CheckpointManager, CheckpointState], object]
) -> list:
    """Calls `act` on all fake ranks at once, each with its own manager; when all have ended, raises the first error."""
    shared, results, errors = Shared(len(states)), [None] * len(states), []

    def run(rank: int) -> None:
        manager = CheckpointManager(folder, keep=3, lease_check=lambda: None)
        manager.status = manager._untracked = FakeStatus(rank, len(states), shared)
        try:
            results[rank] = act(manager, states[rank])  # type: ignore[call-overload]
        except BaseException as error:
            errors.append((rank, error))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(states))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=lambda each: each[0])[1]
    return results


def save_all(states: Sequence[CheckpointState], folder: Path, step: int) -> Path:
    """Saves one checkpoint from all fake ranks."""
    on_all(states, folder, lambda manager, state: manager.save(step, state))
    return folder / f"step_{step}"


def load_all(states: Sequence[CheckpointState], path: Path) -> list[Restored]:
    """Loads a checkpoint on all fake ranks."""
    return on_all(states, path.parent, lambda manager, state: manager.load(path, state))
