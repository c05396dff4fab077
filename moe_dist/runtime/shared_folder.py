"""Checks that every rank sees rank 0's run folder. Does not import torch.

With a separate local folder on each node, the parts of a checkpoint would lie on different nodes and could not be loaded.
The check uses a file, because there is no process group yet.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.runtime.environment import RankEnv

WAIT_SECONDS = 60.0  # an NFS client may cache for a while that a new file does not exist
_POLL_SECONDS = 0.1


@contextmanager
def shared_with_rank_0(run_folder: Path, env: RankEnv, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """On rank 0: writes a file, and deletes it at the end of the block. On other ranks: waits for the file.

    Enter it after rank 0 has opened the run folder. All ranks must enter before rank 0 leaves, so create the process group
    inside the block. Does nothing if all ranks are on one node.

    Raises:
        ConfigError: the file did not appear: run.root is a different folder on this node, or missing.
    """
    probe = run_folder / f".shared_{env.attempt_id}_{env.attempt}"
    if env.local_world_size == env.world_size:
        yield
    elif env.rank == 0:
        probe.write_text(f"{env.attempt_id}\n")  # the content does not matter, only that it appears
        try:
            yield
        finally:
            probe.unlink(missing_ok=True)
    else:
        deadline = time.monotonic() + wait_seconds
        while not probe.exists():
            if time.monotonic() >= deadline:
                what = "is a different folder, or rank 0 has not started" if run_folder.exists() else "does not exist"
                raise ConfigError(
                    f"rank {env.rank} waited {wait_seconds:g} s for {probe.name}, which rank 0 writes into {run_folder}; "
                    f"on this node it {what}; run.root must be a folder that all nodes share"
                )
            time.sleep(_POLL_SECONDS)
        yield


def relative_paths(config: Config) -> list[str]:
    """A message for each relative path of the configuration: its meaning depends on a node's working directory."""
    paths = {"run.root": config.run.root, "data.path": config.data.path, "run.init_from": config.run.init_from}
    return [
        f"{key}={path!r}: must be absolute on a cluster, and the same folder on all nodes"
        for key, path in paths.items()
        if path is not None and not Path(path).is_absolute()
    ]
