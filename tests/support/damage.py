"""Damages random files: truncates, swaps or removes them, flips bits, or replaces them by another format, save or step."""

import os
import random
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOREIGN = (
    b"",
    b"\x80\x05\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93.",  # a pickle
    b"PK\x03\x04" + b"\0" * 64,  # the beginning of a torch.save file
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"{}",
    b"null",
    b"\xff\xfe\x00",
    struct.pack("<Q", 1 << 62) + b"{}",  # a header that claims exabytes
    struct.pack("<Q", 64) + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}          ' + b"\0" * 4,
    struct.pack("<Q", 100_000) + b"[" * 100_000,
    b"# save 0123\n" + b"0" * 64 + b"  index.json\n",
)
KINDS = ("truncated", "bit flipped", "missing", "swapped", "foreign", "other save", "wrong step", "emptied", "grown")


@dataclass(frozen=True)
class Damage:
    """A description of the damage, for the message of a failing test."""

    kind: str
    file: str
    detail: str


def damage(folder: Path, files: Sequence[str], draw: random.Random, *, other: Path) -> Damage:
    """Damages one of a folder's files.

    Args:
        files: Names to choose from.
        other: A folder with files of the same names and other contents.
    """
    kind, name = draw.choice(KINDS), draw.choice(list(files))
    path = folder / name
    content = path.read_bytes()
    if kind == "truncated":
        size = draw.randrange(len(content))
        os.truncate(path, size)
        return Damage(kind, name, f"to {size} of {len(content)} bytes")
    if kind == "bit flipped":
        at, bit = draw.randrange(len(content)), draw.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        return Damage(kind, name, f"bit {bit} of byte {at}")
    if kind == "swapped":
        alike = [each for each in files if each != name and Path(each).suffix == path.suffix]
        if alike and (partner := folder / draw.choice(alike)).read_bytes() != content:
            path.write_bytes(partner.read_bytes())
            partner.write_bytes(content)
            return Damage(kind, name, f"with {partner.name}")
    if kind == "other save" and (other / name).read_bytes() != content:
        shutil.copy(other / name, path)
        return Damage(kind, name, f"from {other}")
    if kind == "wrong step":
        for each in files:
            shutil.copy(other / each, folder / each)
        return Damage(kind, files[0], f"all files from {other}")
    if kind == "foreign":
        number = draw.randrange(len(FOREIGN))
        path.write_bytes(FOREIGN[number])
        return Damage(kind, name, f"content {number}")
    if kind == "emptied":
        path.write_bytes(b"\0" * len(content))
        return Damage(kind, name, "zeros")
    if kind == "grown":
        path.write_bytes(content + draw.choice((b"\0", b"\n}", content[:20])))
        return Damage(kind, name, "at its end")
    path.unlink()
    return Damage("missing", name, "")
