"""Runs Python's garbage collector at the same steps on all ranks.

An automatic garbage collection pauses one rank at a random moment; all ranks then wait for it in the next collective.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

COLLECT_EVERY = 50  # number of steps between two collections, which `Trainer` makes


@contextmanager
def collected_by_steps() -> Iterator[None]:
    """Turns automatic collections off during the `with` block. Collections in the block skip objects that were made before,
    such as modules and the plan. They therefore take only a few milliseconds."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
