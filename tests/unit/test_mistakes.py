"""Mistakes of new users end with the right exit code and an error that names field, value, rule and fix."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from moe_dist.__main__ import make_app
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from tests.support.tiny import tiny_config, tiny_dataset, write_config

FILES = {
    "tab.yaml": "run:\n\tname: a\n",
    "notes.txt": "hello\nworld\n",
    "pictures/a.png": "no picture",
    "texts/a.txt": "hello",
    "latin/a.txt": b"caf\xe9",
    "folder/x": "",
    "runs/fe-one/x": "",
}
MISTAKES: tuple[tuple[str, int, str], ...] = (
    ("launch local x.yaml --train.steps=3", 2, "has no dashes; write train.steps=3"),
    ("launch local nope.yaml", 78, "cannot be read: No such file or directory; configs/ has"),
    ("launch local tab.yaml", 78, "tab.yaml: line 2, column 1 ('name: a'): no tab may stand before a key or value"),
    ("launch local x.yaml data.path=/nowhere", 78, "make the default data with `moe-dist prepare-data --out /nowhere`"),
    ("launch local x.yaml --nproc 0", 2, "'0' must be greater than or equal to 1"),
    ("launch local x.yaml --nproc two", 2, "'two' must be a whole number without unit or currency; write --nproc 2"),
    ("launch local x.yaml model.moe.groups.text.modalities=[video]", 78, "'video': no such modality in the data"),
    ("launch local x.yaml placement.groups.text.ranks=[9]", 78, "take ranks below parallel.ep=2, or raise it"),
    ("launch local x.yaml optimizer.backend=apex", 78, "its kernels need CUDA, but parallel.device=cpu"),
    ("launch local x.yaml run.init_from=nowhere", 78, "run.init_from='nowhere': no such folder; give a run folder"),
    ("launch local x.yaml data.weights.pictures=1.0", 78, "remove it, or set data.weights={} to draw from all sources"),
    ("launch local x.yaml parallel.device=cuda", 69, "this machine shows no GPU"),
    ("launch slurm x.yaml --dependency 12 --dry-run", 78, "must have the form afterok:1234"),
    ("launch ray x.yaml run.root=runs", 78, "as in run.root=/shared/folder/runs see docs/ray.md"),
    ("launch ray x.yaml --submit http://127.0.0.1:9", 69, "it must be the address of the dashboard"),
    ("launch ray x.yaml --env NOPE_VARIABLE --submit http://127.0.0.1:9", 78, "this variable is not set; export it first"),
    ("launch ray", 78, "CONFIG is missing: name the YAML file of the run"),
    ("launch kubernetes x.yaml", 78, "give --cluster FILE, a YAML file with `kubernetes: {image: "),
    ("launch slrm x.yaml", 2, "Did you mean 'slurm'?"),
    ("trian x.yaml", 2, "Did you mean 'train'"),
    ("prepare x", 2, "Did you mean 'prepare-data'"),
    ("export_hf x", 2, "Did you mean 'export-hf'"),
    ("reproduce adamoe", 2, "in a clone of the repository run `python -m research.experiments`"),
    ("compare-methods --budget 1.5", 2, "run `python -m research.compare_methods`"),
    ("bench", 2, "run `python -m research.bench`"),
    ("status nope", 78, "there is no folder nope; give the run's folder, or --root FOLDER"),
    ("prepare-data --text notes.txt --out a", 65, "give plain texts as files of a folder"),
    ("prepare-data --images folder --out a", 78, "holds no .png, .jpg, .jpeg file"),
    (
        "prepare-data --images pictures --strict --out a",
        65,
        "not a PNG or JPEG, or damaged; replace or remove it, or leave out",
    ),
    ("prepare-data --text missing --out a", 78, "text 'missing': no such file or folder"),
    ("prepare-data --text texts --out /proc/x", 1, "nothing was made: mend this, or choose another folder"),
    (
        "prepare-data --text texts --tokenizer notes.txt --out a",
        65,
        "'notes.txt': must be a tokenizer.json of Hugging Face",
    ),
    (
        "prepare-data --text latin --out a",
        78,
        "latin/a.txt: not UTF-8 at byte 3; convert it (`iconv -f LATIN1 -t UTF-8 old.txt > new.txt`)",
    ),
    ("prepare-data --images pictures --out a", 65, "the first: picture 'pictures/a.png': not a PNG or JPEG, or damaged"),
    ("prepare-data --images one --out a", 65, "--codes 512: the pictures have only 31 distinct patches; give --codes 31"),
    ("import-hf nowhere --out a", 65, "no such folder; give a folder with config.json and model.safetensors in it"),
    (
        "export-hf runs/nope --out a",
        78,
        "runs/nope: no such folder; give the folder of a checkpoint (step_N), a folder of checkpoints, or a run folder",
    ),
    ("evaluate runs/nope", 78, "runs/nope: no such folder; give the folder of a checkpoint (step_N)"),
    ("evaluate runs/fe-one", 78, "nothing to evaluate: give --tasks, --questions or --harness"),
    ("verify runs/nope", 78, "runs/nope: no such folder; give the folder of a checkpoint (step_N)"),
    ("inspect runs/nope", 78, "runs/nope: no such folder; give the folder of a checkpoint (step_N)"),
    ("inspect runs/fe-one", 78, "contains no checkpoint"),
    ("report runs/nope", 78, "runs/nope: no such folder; give a run folder (runs/<name>) or a trace folder"),
    ("report runs/fe-one", 78, "neither a run (config.yaml and metrics.jsonl) nor a trace"),
    ("report fe-onne", 78, "report: fe-onne: no such folder; did you mean runs/fe-one?"),
    ("compare fe-onne fe-two", 78, "fe-onne: no such folder; did you mean runs/fe-one?"),
    ("evaluate runs/fe-oen --tasks wordnet", 78, "did you mean runs/fe-one?"),
    ("compare runs/nope runs/other", 78, "give a run folder (runs/<name>) or its metrics.jsonl"),
    ("plan x.yaml --gpus 0", 78, "--gpus 0: must be 1 or more; write a number (8) or a range (8..64)"),
    ("plan x.yaml --price $2.5", 2, "'$2.5' must be a number without unit or currency; write --price 2.5"),
    ("plan x.yaml --gpus 8 --trace nowhere", 78, "--trace nowhere: no such folder; give a run folder (runs/<name>)"),
    ("calibrate --out rates.txt", 78, "the name must end with .yaml"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    tiny_dataset(folder / "data")
    write_config(tiny_config(folder / "data", folder / "runs"), folder / "x.yaml")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "one").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "one/a.png")
    return folder


def made(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix != ".lock")  # lock files stay for the next process


@pytest.mark.parametrize(("line", "code", "words"), MISTAKES, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.slow
def test_a_mistake_is_told(line: str, code: int, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    before = made(folder)
    done = CliRunner().invoke(make_app(), line.split())
    shown = done.output + done.stderr
    assert words in " ".join(shown.split()), shown
    assert done.exit_code == code, shown
    assert "Traceback" not in shown
    assert made(folder) == before, "nothing is made of a wrong input"


def train_alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_dist", "train", *arguments]  # in a separate process, because a rank calls exit
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_one_rank_of_a_run_of_two_is_told_to_use_a_launcher(folder: Path) -> None:
    done = train_alone(folder, "x.yaml")
    assert done.returncode == 78
    assert "1 ranks were started" in done.stderr
    assert "as `moe-dist launch local` does" in done.stderr


def test_a_finished_run_that_is_asked_for_fewer_steps_says_so(tmp_path: Path, tiny_data: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "runs")
    path, run = write_config(config, tmp_path / "x.yaml"), RunFolder.of(config)
    lease = run.open(config, RankEnv(0, 2, 0, 2, "file:///x", attempt=0, attempt_id="first"), wait_seconds=0.0)
    assert run.write_status(verdict=0, reason="done", last_step=4, attempt_id="first")
    run.write_summary("the old summary\n")
    lease.release()
    done = CliRunner().invoke(make_app(), ["launch", "local", str(path), "train.steps=3"])
    assert done.exit_code == 0
    assert "train.steps=3: " in done.stdout
    assert "has already finished 4 steps, so there is nothing to do; to go on, set train.steps above 4" in done.stdout
    assert "the old summary" not in done.stdout
    assert "the old summary" in CliRunner().invoke(make_app(), ["launch", "local", str(path)]).stdout


def test_a_python_without_the_packages_is_told() -> None:
    command = [sys.executable, "-S", "-m", "moe_dist", "status"]  # -S: without site-packages
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "lacks the package typer; start the Python that moe_dist was installed for" in done.stderr
    assert "Traceback" not in done.stderr
