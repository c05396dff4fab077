"""A wheel of this clone, installed and used in an empty folder, needs nothing from the clone."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.full  # builds a wheel, an environment and a job in 70 s of CPU time
ROOT = Path(__file__).parents[2]
CONFIG = "adamoe_moma_tiny_cpu"
Done = subprocess.CompletedProcess[str]
# Imports every module and prints every subcommand's help in one process, because each process would import torch again.
IMPORT_ALL = """
import importlib, pkgutil, sys
from moe_dist.__main__ import commands, load_subcommand, main
load_subcommand("doctor")  # puts launchers and tools on the path
for top in ("moe_dist", "launchers", "tools"):
    package = importlib.import_module(top)
    assert "wheel-environment" in package.__file__, package.__file__
    for found in pkgutil.walk_packages(package.__path__, f"{top}."):
        if not found.name.startswith("moe_dist.bundled"):
            importlib.import_module(found.name)
for words in ["", "launch", *(words for words, _, _ in commands())]:
    sys.argv = ["moe-dist", *words.split(), "--help"]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, words
"""
SHOW_CODE_FOLDER = """
from moe_dist.__main__ import load_subcommand
load_subcommand("slurm")
from launchers.snapshot import code_folder
print(code_folder())
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes an environment with only the wheel, which sees this environment's dependencies but not this clone."""
    folder = tmp_path_factory.mktemp("wheel-environment")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "clone" / name)
    pip, offline = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"], ["--no-deps", "--no-index"]
    built = [*pip, "wheel", *offline, "--no-build-isolation", str(folder / "clone"), "--wheel-dir"]
    for target in (folder, folder / "again"):
        subprocess.run([*built, str(target)], check=True, env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"})
    shutil.rmtree(folder / "clone")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", *offline, str(wheel)], check=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # Python ignores .pth files inside a folder that a .pth file names, so it does not find the editable clone.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "venv"


def test_a_wheel_built_twice_has_equal_bits(environment: Path) -> None:
    first, again = (next(folder.glob("*.whl")) for folder in (environment.parent, environment.parent / "again"))
    assert first.read_bytes() == again.read_bytes()


@pytest.fixture
def call(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs `moe-dist` from the installed wheel in an empty folder."""
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run(*arguments: str, program: str = "moe-dist") -> Done:
        command = [str(environment / "bin" / program), *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    return run


def test_every_module_imports_and_every_subcommand_has_a_help(call: Callable[..., Done]) -> None:
    done = call("-c", IMPORT_ALL, program="python")
    assert done.returncode == 0, done.stderr
    assert "moe-dist launch slurm" in done.stdout


def test_launchers_and_tools_are_no_names_of_the_environment(call: Callable[..., Done]) -> None:
    for name in ("launchers", "tools"):
        assert "ModuleNotFoundError" in call("-c", f"import {name}.doctor", program="python").stderr


@pytest.mark.exhaustive  # compiles C++
def test_a_job_in_an_empty_folder(call: Callable[..., Done], tmp_path: Path) -> None:
    """Runs a shortened default job on a few texts and pictures instead of the default data."""
    assert "Peak learning rate" in call("explain", "optimizer.lr").stdout
    missing = call("launch", "local", CONFIG)
    assert (missing.returncode, "moe-dist prepare-data" in missing.stderr) == (78, True)

    for name in ("texts", "pictures"):
        (tmp_path / name).mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(
            "".join(f"{row} x {number} = {row * number}\n" for row in range(200))
        )
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"picture {number}")
        Image.new("RGB", (32, 32), (20 * number, 255 - 20 * number, 100)).save(tmp_path / "pictures" / f"{number}.png")
    made = call("prepare-data", "--text", "texts", "--images", "pictures", "--vocab-size", "320", "--codes", "16")
    assert made.returncode == 0, made.stderr

    job = [CONFIG, "model.vocab_size=336", "data.weights={images: 0.5, text: 0.5}"]
    assert call("doctor", *job).returncode in (0, 1), "warnings of this machine are no fault of the package"
    slurm = call("launch", "slurm", *job, "--cluster", "cpu", "--dry-run")
    assert slurm.returncode == 0, slurm.stderr
    assert "#SBATCH --nodes=1" in slurm.stdout
    ray = call("launch", "ray", *job, "--cluster", "cpu", "--dry-run")
    assert ray.returncode == 0, ray.stderr
    assert ray.stdout.splitlines()[-1].startswith(f"python -m launchers.ray configs/{CONFIG}.yaml ")
    assert f"run.root={tmp_path}/runs" in ray.stdout
    assert not (tmp_path / ".moe_dist").exists(), "a dry run leaves nothing"

    quick = [
        "train.steps=2",
        "evaluation.sequences=4",
        "evaluation.final_sequences=4",
        "evaluation.balance_efficiency=false",
    ]
    trained = call("launch", "local", *job, *quick, "run.name=short")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    records = (tmp_path / "runs" / "short" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records if json.loads(line)["kind"] == "step"] == [1, 2]
    assert "short" in call("status").stdout


def test_nodes_get_the_code_laid_out_as_a_clone(call: Callable[..., Done], tmp_path: Path) -> None:
    """Nodes of Slurm and Ray run a copy of the installed files. It is made once, and needs no installed moe_dist."""
    first, second = (call("-c", SHOW_CODE_FOLDER, program="python") for _ in range(2))
    assert first.stdout == second.stdout, first.stderr
    folder = Path(first.stdout.strip())
    assert {each.name for each in folder.iterdir()} == {"configs", "launchers", "moe_dist", "slurm", "tools"}
    assert [each.name for each in (tmp_path / ".moe_dist").iterdir()] == [folder.name]
    command = [sys.executable, "-m", "launchers.slurm.job"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert "sbatch" in done.stderr
    assert "Traceback" not in done.stderr
