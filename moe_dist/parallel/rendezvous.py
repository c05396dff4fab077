"""The store in which the ranks meet."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from moe_dist.runtime.environment import PUBLISHED, RankEnv
from moe_dist.runtime.lease import WAIT_SECONDS
from moe_dist.runtime.rendezvous import address_file, find, listening_host, publish, withdraw


@contextmanager
def published_store(env: RankEnv, run_folder: Path, *, timeout: float) -> Iterator[Store | None]:
    """The store at the address that rank 0 publishes in the run folder; None where the environment says how to meet.

    Make the process group inside the block: at its end all ranks have come, and rank 0 takes the address away.

    Args:
        timeout: Seconds that a rank waits for rank 0, and rank 0 for an answer.

    Raises:
        ConfigError, PlacementError, RunFolderError: as `runtime.rendezvous`.
    """
    if env.init_method != PUBLISHED:
        yield None
        return
    path, wait = address_file(run_folder), timedelta(seconds=timeout)
    if env.rank > 0:
        address = find(path, env, wait_seconds=timeout + WAIT_SECONDS)  # rank 0 may have to wait for the lease first
        store = TCPStore(address.host, address.port, env.world_size, False, wait)
        yield PrefixStore(address.secret, store)
        return
    address, listener = publish(path, env, listening_host(env, os.environ))
    try:
        store = TCPStore(
            address.host,
            address.port,
            env.world_size,
            True,
            wait,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # the store's from here on, and closed with it
        )
        yield PrefixStore(address.secret, store)
    finally:
        withdraw(path, address)
