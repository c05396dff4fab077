"""The table docs/hf-families.md agrees with its record, and new runs of the families give the recorded verdicts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cover import exhaustive

ROOT = Path(__file__).parents[2]
RECORD: dict[str, Any] = json.loads((ROOT / "research/records/hf_families.json").read_text())
NAMES = sorted({key.partition(".")[0] for key in RECORD["families"]})

QUICK = "aria"  # a fast case, with pictures


def tool(*options: str) -> None:
    subprocess.run([sys.executable, "-m", "research.hf_families", *options], cwd=ROOT, check=True)


def test_page_is_what_the_record_gives(tmp_path: Path) -> None:
    tool("--no-run", f"--out={tmp_path / 'page.md'}")
    assert (ROOT / "docs/hf-families.md").read_text() == (tmp_path / "page.md").read_text()
    working = {key.partition(".")[0] for key, found in RECORD["families"].items() if "refused" not in found}
    assert len(working) >= 45


@pytest.mark.parametrize("name", [name if name == QUICK else exhaustive(name) for name in NAMES])
@pytest.mark.slow
def test_verdict(tmp_path: Path, name: str) -> None:
    """Compares a family on two ranks with one rank again. The verdict must be the recorded one."""
    record = tmp_path / "record.json"
    tool(f"--record={record}", f"--out={tmp_path / 'page.md'}", f"--family={name}")
    found = json.loads(record.read_text())["families"]
    assert {key.partition(".")[0] for key in found} == {name}
    for key, result in found.items():
        wanted = RECORD["families"][key]
        assert ("refused" in result) == ("refused" in wanted), result
        # The needs of a refused family depend on which rank's error is read first.
        assert "refused" in result or result["needs"].keys() == wanted["needs"].keys(), result


def test_every_class_is_in_the_record() -> None:
    """Every family that transformers marks with its experts interface is recorded. Another version needs another table."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    marked = {
        file.parent.name for file in models.glob("*/modeling_*.py") if "@use_experts_implementation" in file.read_text()
    }
    if transformers.__version__ == RECORD["versions"]["transformers"]:
        assert marked == {key.partition(".")[0] for key in (*RECORD["families"], *RECORD["missing"])}
