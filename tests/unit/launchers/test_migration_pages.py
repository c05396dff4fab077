"""The pages for users of other systems: the site file and the command of their whole job make this job."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_dist.__main__ import make_app

PAGES = Path(__file__).parents[3] / "docs/how-to"


@pytest.mark.parametrize("page", ["from-megatron-lm", "from-torchtitan"])
def test_the_whole_job_asks_for_what_the_old_one_did(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (PAGES / f"{page}.md").read_text().partition("## A whole job")[2]
    (site,) = re.findall(r"```yaml\n# site.yaml\n(.*?)```", text, re.DOTALL)
    Path("site.yaml").write_text(site)
    (command,) = re.findall(r"^\$ moe-dist (.*--dry-run)$", text, re.MULTILINE)
    done = CliRunner().invoke(make_app(), command.split())
    assert done.exit_code == 0, done.output
    asked = set(re.findall(r"--(account|partition|time|nodes|gres)=(\S+)", text))
    made = set(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", done.output, re.MULTILINE))
    assert asked <= made
    assert ("ntasks", "16") in made
