"""Runs a notebook of docs/tutorials from its first to its last cell."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"


def run_tutorial(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the notebook in `folder`, with this environment's commands. Fails if a cell fails or prints an error."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MPLBACKEND", "agg")
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    for cell in book.cells:  # a failing `!command` raises nothing
        text = "".join(output.get("text", "") for output in cell.get("outputs", []))
        assert "Traceback" not in text, text
        assert "see docs/" not in text, text  # error messages end with this line
