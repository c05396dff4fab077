"""Runs Python's garbage collector at the same steps on all ranks.

An automatic collection stops one rank at a random moment, and its peers wait for this rank in their next collective.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

COLLECT_EVERY = 50  # steps; `Trainer` collects


@contextmanager
def collected_by_steps() -> Iterator[None]:
    """Turns automatic collections off. Objects that exist now, such as modules and the plan, are left out of later
    collections, so that a collection takes a few milliseconds."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
