"""The table of transformers' families (docs/hf-families.md) is what its record gives, and its verdicts are repeated."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cover import exhaustive
from tools.hf_families.needs import LIMITS
from tools.hf_families.page import page, verdict

ROOT = Path(__file__).parents[2]
RECORD: dict[str, Any] = json.loads((ROOT / "research/records/hf_families.json").read_text())
CHEAP = ("mixtral", "deepseek_v3", "qwen3_vl_moe")
OTHERS = sorted({key.partition(".")[0] for key in RECORD["families"]}.difference(CHEAP))


def test_page_is_what_the_record_gives() -> None:
    assert (ROOT / "docs/hf-families.md").read_text() == page(RECORD, LIMITS), "run python -m tools.hf_families"


def test_enough_families_work() -> None:
    working = {key.partition(".")[0] for key, found in RECORD["families"].items() if verdict(found) != "refused"}
    assert len(working) >= 45


def test_every_class_stands_in_the_table() -> None:
    from importlib.metadata import version

    from tools.hf_families.tiny import families

    if version("transformers") == RECORD["versions"]["transformers"]:
        assert {each.key for each in families()} == RECORD["families"].keys()


@pytest.mark.parametrize("names", [CHEAP, *(exhaustive((name,)) for name in OTHERS)], ids=lambda names: names[0])
def test_verdicts(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Runs the families again, on two ranks and on one."""
    record = tmp_path / "record.json"
    options = [f"--record={record}", f"--out={tmp_path / 'page.md'}", *(f"--family={name}" for name in names)]
    subprocess.run([sys.executable, "-m", "tools.hf_families", *options], cwd=ROOT, check=True)
    for key, found in json.loads(record.read_text())["families"].items():
        wanted = RECORD["families"][key]
        assert (verdict(found), found["needs"].keys()) == (verdict(wanted), wanted["needs"].keys()), found
