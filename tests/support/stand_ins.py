"""Commands on the path that replace other commands, such as Slurm's."""

import os
from pathlib import Path

import pytest


def stand_in(folder: Path, path: pytest.MonkeyPatch | None = None, **bodies: str) -> None:
    """Writes a bash script for each command (they run in `folder`), and puts the folder first on the path."""
    folder.mkdir(exist_ok=True)
    for name, body in bodies.items():
        script = folder / name
        script.write_text(f"#!/bin/bash\ncd {folder}\n{body}\n")
        script.chmod(0o755)
    if path is not None:
        path.setenv("PATH", f"{folder}:{os.environ['PATH']}")
