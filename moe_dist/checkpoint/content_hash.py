"""Names a model by what its parameters are: the same for any layout, step count or optimizer."""

import hashlib

from moe_dist.checkpoint.index import Index
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX


def content_hash(index: Index) -> str:
    """SHA-256 over name, type, shape and fingerprint of every parameter and buffer; moments are left out."""
    lines = [
        f"{name} {entry.dtype} {list(entry.shape)} {entry.fingerprint}\n"
        for name, entry in sorted(index.tensors.items())
        if not name.startswith(OPTIMIZER_PREFIX)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
