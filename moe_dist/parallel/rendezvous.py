"""The rendezvous store of torch.distributed at an address that rank 0 publishes."""

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
    """Yields the store at the address that rank 0 publishes in the run folder; None if the init method is not PUBLISHED.

    Create the process group inside this context. At the context's end all ranks have connected, and rank 0 deletes the
    address.

    Args:
        timeout: Seconds that a rank waits for rank 0's address, and for each answer of the store.

    Raises:
        ConfigError, ResourceError, RunFolderError: from `runtime.rendezvous`.
    """
    if env.init_method != PUBLISHED:
        yield None
        return
    path, wait = address_file(run_folder), timedelta(seconds=timeout)
    if env.rank > 0:
        address = find(path, env, wait_seconds=timeout + WAIT_SECONDS)  # rank 0 may wait for the lease first
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
            master_listen_fd=listener.detach(),  # the socket itself, so that no other process can take the port meanwhile
        )
        yield PrefixStore(address.secret, store)  # a peer with another secret cannot see the keys
    finally:
        withdraw(path, address)
