"""Makes each phase of a save or load fail on all ranks or on none. An all-reduce tells all ranks which ranks failed."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from moe_dist.comm.collectives import sum_over
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.errors import CheckpointError, ConfigError, DataError, DivergedError, MoeDistError

_UNWRITABLE = 2  # status of a rank after CheckpointError; after any other error it is 1000 + the exit code

T = TypeVar("T")


class CollectiveStatus:
    """Gives every rank the status of all ranks that save or load together. A status is 0 or an error code.

    Args:
        place: Folder of the checkpoints, for error messages.
        process_group: Gloo group of the ranks that save or load together; None for a single rank.
        tracker: The watchdog's tracker, which records the all-reduces. With None, nothing records them.
    """

    def __init__(
        self, place: str, process_group: dist.ProcessGroup | None, tracker: CollectiveTracker | None = None
    ) -> None:
        self._place, self._group, self._watch = place, process_group, tracker
        self.rank = dist.get_rank(process_group) if process_group else 0
        self.world_size = dist.get_world_size(process_group) if process_group else 1

    def add(self, numbers: list[int], name: str = "checkpoint numbers") -> list[int]:
        """Sums each of `numbers` over all ranks in one all-reduce. The sums are int64 and wrap modulo 2^64."""
        summed = sum_over(torch.tensor(numbers, dtype=torch.int64), self._group, name=name, tracker=self._watch)
        return summed.tolist()

    def first(self, name: str, action: Callable[[], T], *, kind: type[MoeDistError] = DataError) -> T | None:
        """Works like `phase`, but runs `action` on rank 0 only, and returns None on the other ranks."""
        return self.phase(name, lambda: action() if self.rank == 0 else None, kind=kind)

    def broadcast(self, name: str, action: Callable[[], int]) -> int:
        """Works like `first`, but returns rank 0's result on all ranks. Costs two all-reduces."""
        (number,) = self.add([self.first(name, action) or 0])
        return number

    def phase(self, name: str, action: Callable[[], T], *, kind: type[MoeDistError] = DataError) -> T:
        """Runs `action` on all ranks and returns this rank's result. If `action` fails on any rank, all ranks raise. Costs
        one all-reduce.

        A file system error becomes an error of class `kind`; any other error is raised unchanged on the rank that failed.
        """
        error: Exception | None = None
        result: T | None = None
        try:
            result = action()
        except (OSError, SafetensorError) as cause:
            error = kind(f"checkpoint in {self._place}: cannot {name} on rank {self.rank}: {cause}")
            error.__cause__ = cause  # keeps the traceback of the file system error
        # Every error must reach the all-reduce below, because a rank that raised at once would leave other ranks waiting.
        except Exception as cause:
            error = cause
        reports = [0] * self.world_size  # each rank sets only its own entry; the sum over ranks has all statuses
        if error is not None:
            reports[self.rank] = _report(error)
        codes = self.add(reports, f"checkpoint vote to {name}")  # the only collective of a phase, also after an error
        if error is not None:
            raise error
        if any(codes):
            raise _remote_error(f"checkpoint in {self._place}: cannot {name}", codes)
        return result  # pyright: ignore[reportReturnType]


def _report(error: Exception) -> int:
    if isinstance(error, CheckpointError):
        return _UNWRITABLE
    return 1000 + (error.exit_code if isinstance(error, MoeDistError) else MoeDistError.exit_code)


def _remote_error(what: str, codes: list[int]) -> MoeDistError:
    """Returns the error that the ranks without a failure raise. Its class is the class of the error on the failed rank with
    the lowest number, if the table below contains that class, else MoeDistError."""
    ranks = [rank for rank, code in enumerate(codes) if code]
    message = f"{what}: it failed on ranks {ranks}; see the log of rank {ranks[0]} for the reason"
    code = codes[ranks[0]]
    kinds: dict[int, type[MoeDistError]] = {
        _UNWRITABLE: CheckpointError,
        1000 + ConfigError.exit_code: ConfigError,
        1000 + DataError.exit_code: DataError,
        1000 + DivergedError.exit_code: DivergedError,
    }
    error = kinds.get(code, MoeDistError)(message)
    error.consequence = True  # a consequence: only the failed rank knows and reports the reason
    return error
