"""Commands that stand in for others on the path, as for those of Slurm."""

import os
from pathlib import Path

import pytest


def stand_in(folder: Path, path: pytest.MonkeyPatch | None = None, **bodies: str) -> None:
    """Writes a bash script for each command, which runs in `folder`, and puts the folder first on the path."""
    folder.mkdir(exist_ok=True)
    for name, body in bodies.items():
        script = folder / name
        script.write_text(f"#!/bin/bash\ncd {folder}\n{body}\n")
        script.chmod(0o755)
    if path is not None:
        path.setenv("PATH", f"{folder}:{os.environ['PATH']}")
