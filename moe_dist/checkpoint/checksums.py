"""SHA256SUMS: the digests of a checkpoint's JSON files, as `sha256sum -c SHA256SUMS` checks them. Imports no torch.

With it every bit of a checkpoint is guarded: the sums guard index.json and state.json, the index guards the headers of the
shards (ShardEntry), and fingerprints guard the tensors.
"""

import hashlib
import re
from pathlib import Path

from moe_dist.checkpoint.index import INDEX_FILE
from moe_dist.checkpoint.state_file import STATE_FILE

SEAL_FILE = "SHA256SUMS"
SEALED = (INDEX_FILE, STATE_FILE)

_MAX_BYTES = 4096


def seal_of(contents: dict[str, bytes], save_id: str) -> bytes:
    """Content of the file; a comment names the save."""
    lines = [f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in SEALED]
    return "".join([f"# save {save_id}\n", *lines]).encode()


def read_seal(folder: Path) -> tuple[str, dict[str, str]] | None:
    """The save's id and the digest of each file; None where the file is not of that form.

    Raises:
        OSError: it cannot be read.
    """
    with (folder / SEAL_FILE).open("rb") as stream:
        text = stream.read(_MAX_BYTES)
    pattern = rb"# save ([0-9a-f]+)\n" + b"".join(rb"([0-9a-f]{64})  %s\n" % re.escape(name.encode()) for name in SEALED)
    match = re.fullmatch(pattern, text)
    if match is None:
        return None
    save_id, *digests = (group.decode() for group in match.groups())
    return save_id, dict(zip(SEALED, digests, strict=True))


def digest_of(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
