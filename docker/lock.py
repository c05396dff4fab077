"""Writes FOLDER/requirements.lock: name, version and SHA-256 of every wheel in FOLDER, for pip install --require-hashes."""

import hashlib
import sys
from pathlib import Path


def lock(folder: Path) -> str:
    lines = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    return "".join(lines)


if __name__ == "__main__":
    (Path(sys.argv[1]) / "requirements.lock").write_text(lock(Path(sys.argv[1])))
