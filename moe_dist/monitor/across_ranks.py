"""Which rank of the world is slowest, and which one needs the most memory. Shape letter: W ranks of the world."""

import numpy as np


def slowest_rank(busy_seconds_W: np.ndarray) -> dict[str, float]:
    """The rank that worked longest, its seconds, and the median seconds of the other ranks; empty with a single rank."""
    if busy_seconds_W.size < 2:
        return {}
    rank = int(busy_seconds_W.argmax())
    return {
        "slowest_rank": rank,
        "slowest_rank_seconds": float(busy_seconds_W[rank]),
        "other_ranks_seconds": float(np.median(np.delete(busy_seconds_W, rank))),
    }


def memory_of_ranks(memory_W3: np.ndarray) -> dict[str, float]:
    """The largest of each number in `Record.memory_W3`, the largest difference of reserved and allocated memory, and the
    rank of each; empty in the first step."""
    if not memory_W3.size:
        return {}
    allocated_W, reserved_W, retries_W = memory_W3.T
    by_name = {"allocated_mib": allocated_W, "reserved_mib": reserved_W, "allocator_retries": retries_W}
    by_name["unused_mib"] = reserved_W - allocated_W
    largest = {f"largest_{name}": float(value_W.max()) for name, value_W in by_name.items()}
    return largest | {f"largest_{name}_rank": int(value_W.argmax()) for name, value_W in by_name.items()}
