"""A login node needs no torch: its commands import without it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Folders and files that a login node imports without torch.
TORCH_FREE = (
    "moe_dist/__init__.py", "moe_dist/errors.py", "moe_dist/config", "moe_dist/placement", "moe_dist/plan",
    "moe_dist/runtime", "moe_dist/formats", "moe_dist/train/__main__.py", "moe_dist/checkpoint/contents.py",
    "moe_dist/checkpoint/directory.py", "tools/compare_runs.py",
    "tools/inspect_checkpoint.py", "tools/plan.py", "launchers",
)  # fmt: skip


def import_without_torch(modules: list[str]) -> subprocess.CompletedProcess[str]:
    """Imports modules in a process in which importing torch, or a package that needs it, fails."""
    code = (
        "import importlib, sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'megatron'):\n"
        "            raise ImportError(f'{name} is blocked here')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError as error:\n"
        "        sys.exit(f'{name}: {error}')\n"
    )
    return subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_login_node_needs_no_torch() -> None:
    paths = [path for top in TORCH_FREE for path in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))]
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    modules = sorted(".".join(each[:-1] if each[-1] == "__init__" else each) for each in parts)
    assert {"moe_dist", "moe_dist.config.load", "moe_dist.plan.preflight", "launchers.local"} <= set(modules)
    result = import_without_torch(modules)
    assert result.returncode == 0, result.stderr


def test_importing_torch_would_fail_there() -> None:
    assert import_without_torch(["moe_dist.model.transformer"]).returncode != 0
