"""The public API as docs/examples/own_model.py uses it: two ranks train the same model as one."""

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moe_dist
from tests.support.worlds import RankContext

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "own_model.py"


def trained(_: RankContext) -> dict[str, Any]:
    token_BT = torch.randint(100, (8, 17), generator=torch.Generator().manual_seed(1))
    model = runpy.run_path(str(EXAMPLE))["train"](token_BT)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def test_two_ranks_train_the_model_of_one(run_in_world: Callable[..., list[Any]]) -> None:
    (whole,) = run_in_world(1, trained)
    halves = run_in_world(2, trained)
    for name, value in whole.items():
        parts = [torch.from_numpy(half[name]) for half in halves]
        found = torch.cat(parts) if name.startswith("moe.experts.") else parts[0]
        torch.testing.assert_close(
            found, torch.from_numpy(value), rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    start = moe_dist.build_moe_layer(32, runpy.run_path(str(EXAMPLE))["GROUPS"], std=0.2)
    moved = [
        not torch.equal(parameter, torch.from_numpy(whole[f"moe.{name}"])) for name, parameter in start.named_parameters()
    ]
    assert all(moved)


def test_every_public_name_is_there_and_in_its_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(moe_dist.__all__)
    assert all(callable(getattr(moe_dist, name)) for name in moe_dist.__all__)


def test_importing_the_package_loads_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import moe_dist, sys; assert 'torch' not in sys.modules"], cwd=ROOT, check=True)
