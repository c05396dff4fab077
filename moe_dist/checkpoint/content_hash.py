"""A hash of a model's parameters that does not depend on layout, step count or optimizer."""

import hashlib

from moe_dist.checkpoint.index import Index
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX


def content_hash(index: Index) -> str:
    """SHA-256 over name, dtype, shape and fingerprint of every parameter and buffer; without the optimizer's moments."""
    lines = [
        f"{name} {entry.dtype} {list(entry.shape)} {entry.fingerprint}\n"
        for name, entry in sorted(index.tensors.items())
        if not name.startswith(OPTIMIZER_PREFIX)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
