"""Makes a phase of a save or load fail on all ranks or on none: every rank learns of an error on any rank."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from moe_dist.comm.collectives import sum_over
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.errors import CheckpointError, ConfigError, DataError, MoeDistError

_UNWRITABLE = 2  # a rank's status after a CheckpointError; any other error has 1000 + its exit code


class CollectiveStatus:
    """Status exchange between the ranks that save or load together, over a gloo process group; None means one rank.

    Args:
        place: Folder, for messages.
        tracker: Tracker of the watchdog.
    """

    def __init__(
        self, place: str, process_group: dist.ProcessGroup | None, tracker: CollectiveTracker | None = None
    ) -> None:
        self._place, self._group, self._watch = place, process_group, tracker
        self.rank = dist.get_rank(process_group) if process_group else 0
        self.world_size = dist.get_world_size(process_group) if process_group else 1

    def add(self, numbers: list[int], name: str = "checkpoint numbers") -> list[int]:
        """Sums over all ranks, modulo 2^64 as int64. One all-reduce."""
        summed = sum_over(torch.tensor(numbers, dtype=torch.int64), self._group, name=name, tracker=self._watch)
        return summed.tolist()

    def phase(
        self,
        name: str,
        action: Callable[[], None],
        *,
        only_first: bool = False,
        kind: type[MoeDistError] = CheckpointError,
    ) -> None:
        """Runs `action` on all ranks (or on rank 0 only), and raises on all ranks if it failed on any. One all-reduce.

        File system errors become `kind`; other errors are raised unchanged on the rank where they happened.
        """
        error: Exception | None = None
        try:
            if self.rank == 0 or not only_first:
                action()
        except (OSError, SafetensorError) as cause:
            error = kind(f"checkpoint in {self._place}: cannot {name} on rank {self.rank}: {cause}")
            error.__cause__ = cause  # keeps the traceback of the file system error
        # every error must reach the vote below: a rank that raised here would leave its peers waiting
        except Exception as cause:
            error = cause
        reports = [0] * self.world_size  # one slot per rank, so that the sum tells which ranks failed
        if error is not None:
            reports[self.rank] = _report(error)
        # the only collective of a phase; the same on every rank, whatever happened
        codes = self.add(reports, f"checkpoint vote to {name}")
        if error is not None:
            raise error
        if any(codes):
            raise _remote_error(f"checkpoint in {self._place}: cannot {name}", codes)


def _report(error: Exception) -> int:
    if isinstance(error, CheckpointError):
        return _UNWRITABLE
    return 1000 + (error.exit_code if isinstance(error, MoeDistError) else MoeDistError.exit_code)


def _remote_error(what: str, codes: list[int]) -> MoeDistError:
    """The error for ranks without one: of the class that the first failed rank raises."""
    ranks = [rank for rank, code in enumerate(codes) if code]
    message = f"{what}: it failed on ranks {ranks}; see the log of rank {ranks[0]} for the reason"
    code = codes[ranks[0]]
    kinds: dict[int, type[MoeDistError]] = {
        _UNWRITABLE: CheckpointError,
        1000 + ConfigError.exit_code: ConfigError,
        1000 + DataError.exit_code: DataError,
    }
    error = kinds.get(code, MoeDistError)(message)
    error.consequence = True  # so that this rank leaves the verdict to the rank with the reason
    return error
