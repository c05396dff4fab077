"""Release files that no program reads agree with the version and with each other."""

import re
from pathlib import Path

import yaml

from moe_dist import __version__

ROOT = Path(__file__).parents[2]


def test_citation_and_changelog_name_the_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert re.search(rf"^## {re.escape(__version__)} ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
