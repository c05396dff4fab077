"""Release files that no program reads agree with the version and with each other."""

import json
import re
from pathlib import Path

import yaml

from moe_dist import __version__

ROOT = Path(__file__).parents[2]


def test_citation_and_changelog_name_the_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert re.search(rf"^## {re.escape(__version__)} ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_dev_container_is_a_stage_of_the_dockerfile_whose_images_do_not_run_as_root() -> None:
    build = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())["build"]
    dockerfile = (ROOT / ".devcontainer" / build["dockerfile"]).resolve().read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", dockerfile, re.MULTILINE | re.DOTALL))
    assert build["target"] in stages
    for image in ("cpu", "cuda"):
        assert re.search(r"^USER [1-9]\d*$", stages[image], re.MULTILINE)
