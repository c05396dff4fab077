"""Each recipe of CONTRIBUTING.md, applied as written to a copy of the tree, trains one step with the new kind."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.tiny import tiny_config, tiny_dataset, write_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
ONE_STEP = {"train.steps": 1, "evaluation.every": 1000, "evaluation.balance_efficiency": False}
ON_ONE_RANK = {"parallel.ep": 1, "placement": {"policy": "interleaved"}}


class Block(NamedTuple):
    """A block of code: its file, the beginning of the line above it (empty if it is the whole file), and its text."""

    path: str
    below: str
    text: str


class Recipe(NamedTuple):
    blocks: tuple[Block, ...]
    overrides: tuple[str, ...]


def read_recipes(page: str) -> Mapping[str, Recipe]:
    """Returns the recipes by title. The overrides come from the line that begins with "Train with"."""
    recipes = {}
    for part in page.split("\n### ")[1:]:
        title, _, text = part.partition("\n")
        blocks = tuple(
            Block(path, below, code)
            for path, below, code in re.findall(r"```python\n# (\S+), (?:new|below: ([^\n]+))\n(.*?)```", text, re.DOTALL)
        )
        train = re.search(r"^Train with `(.+?)`", text, re.MULTILINE)
        recipes[title] = Recipe(blocks, tuple(shlex.split(train[1])) if train else ())
    return recipes


RECIPES = read_recipes(PAGE)


def apply(recipe: Recipe, tree: Path) -> None:
    for block in recipe.blocks:
        file = tree / block.path
        if not block.below:
            assert not file.exists(), f"{block.path} is there already"
            file.write_text(block.text)
            continue
        lines = file.read_text().splitlines(keepends=True)
        places = [number for number, line in enumerate(lines, start=1) if line.startswith(block.below)]
        assert len(places) == 1, f"{block.path} has {len(places)} lines that begin with {block.below!r}"
        lines.insert(places[0], block.text)
        file.write_text("".join(lines))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in ("moe_dist", "launchers", "tools", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / "tree" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    tiny_dataset(tmp_path / "data")
    return tmp_path / "tree"


def follow(tree: Path, *titles: str) -> list[str]:
    """Applies recipes. Returns the overrides that choose the new kinds."""
    for title in titles:
        apply(RECIPES[title], tree)
    return [override for title in titles for override in RECIPES[title].overrides]


def train_one_step(tree: Path, launcher: tuple[str, ...], overrides: Sequence[str], changes: Mapping[str, object]) -> Path:
    """Trains in the copied tree. Returns the run folder."""
    config = tiny_config(tree.parent / "data", tree.parent / "runs", {**ONE_STEP, **changes})
    path = write_config(config, tree.parent / "config.yaml")
    command = [sys.executable, "-m", *launcher, str(path), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return tree.parent / "runs" / "tiny"


@pytest.mark.full  # copies the tree and runs it; the test above only reads the recipes
def test_router_dispatcher_sink_and_launcher(tree: Path) -> None:
    overrides = follow(tree, "A router", "A dispatcher", "A sink", "A launcher")
    folder = train_one_step(tree, ("moe_dist", "launch", "plain"), overrides, {"parallel.ep": 2})
    step, *losses = (folder / "losses.csv").read_text().rstrip("\n").split(",")
    assert step == "1"
    assert all(1.0 < float(loss) < 10.0 for loss in losses)
    assert json.loads((folder / "status.json").read_text())["verdict"] == 0


@pytest.mark.full  # copies the tree and runs it again
def test_expert_type_and_controller(tree: Path) -> None:
    overrides = follow(tree, "An expert type", "A controller")
    folder = train_one_step(tree, ("launchers.local",), overrides, ON_ONE_RANK)
    step = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert step["step"] == 1
    assert (folder / "checkpoints" / "latest").exists()


def test_a_section_without_its_class_is_refused() -> None:
    (*_, section) = RECIPES["A router"].blocks
    text = section.text.replace("    builds = ", "    # builds = ")
    with pytest.raises(TypeError, match="CosineRouterSection: name the class that it configures, as builds ="):
        exec(compile(text, section.path, "exec"), {"__name__": "cosine"})
