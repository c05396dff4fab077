"""Runs Python's garbage collector at the same steps on all ranks.

An automatic garbage collection pauses a rank at a random moment, and all ranks wait for it in the next collective.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

COLLECT_EVERY = 50  # steps; `Trainer` collects


@contextmanager
def collected_by_steps() -> Iterator[None]:
    """Turns automatic collections off. Collections in the `with` block skip objects made before, such as modules and the
    plan, and therefore take only a few milliseconds."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
