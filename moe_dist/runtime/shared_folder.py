"""Every rank proves that it sees the run folder of rank 0: with a folder of that name on each node's own disk a run would
train, save a part on each, and never load again. By a file, since the proof comes before ranks can talk. No torch here.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.runtime.environment import RankEnv

WAIT_SECONDS = 60.0  # a file server may hide a new file for as long as its clients remember that it was not there
_POLL_SECONDS = 0.1


@contextmanager
def shared_with_rank_0(run_folder: Path, env: RankEnv, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """On rank 0: writes a file of this attempt, and takes it away at the end of the block. On the others: waits for it.

    Enter it when rank 0 has opened the run folder; all ranks must have entered before rank 0 leaves, as they have where the
    process group is made inside. Does nothing where all ranks are on one node.

    Raises:
        ConfigError: the file did not come: this node has another folder of that name, or none.
    """
    probe = run_folder / f".shared_{env.attempt_id}_{env.attempt}"
    if env.local_world_size == env.world_size:
        yield
    elif env.rank == 0:
        probe.write_text(f"{env.attempt_id}\n")
        try:
            yield
        finally:
            probe.unlink(missing_ok=True)
    else:
        _wait_for(probe, env, wait_seconds)
        yield


def relative_paths(config: Config) -> list[str]:
    """Paths that mean something else on each node or in a job's temporary working directory, each with its way out."""
    paths = {"run.root": config.run.root, "data.path": config.data.path, "run.init_from": config.run.init_from}
    return [
        f"{key}={path!r}: must be absolute on a cluster, and the same folder on all nodes"
        for key, path in paths.items()
        if path is not None and not Path(path).is_absolute()
    ]


def _wait_for(probe: Path, env: RankEnv, wait_seconds: float) -> None:
    deadline = time.monotonic() + wait_seconds
    while not probe.exists():
        if time.monotonic() >= deadline:
            what = "not there" if not probe.parent.exists() else "another folder, or rank 0 has not come"
            raise ConfigError(
                f"rank {env.rank} waited {wait_seconds:g} s for {probe.name}, which rank 0 writes into {probe.parent}: "
                f"here that is {what}; run.root must be one folder that all nodes share"
            )
        time.sleep(_POLL_SECONDS)
