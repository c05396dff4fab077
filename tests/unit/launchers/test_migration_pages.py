"""The pages for users of other systems: the site file and the command of their whole job make this job."""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainingArguments
from typer.testing import CliRunner

from moe_dist.__main__ import make_app
from moe_dist.config.load import load_config
from tests.support import chat_folders
from tests.support.guides import guide_commands

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


TRAINER = "how-to/from-trainer.md"


def trainer_script() -> str:
    (script,) = re.findall(r"```python\n(# train.py.*?)```", (PAGES.parent / TRAINER).read_text(), re.DOTALL)
    return script


def trainer_inputs(folder: Path) -> None:
    """The folders that the page's job reads, with a tiny model."""
    chat_folders.main(folder / "OLMoE-1B-7B-0924")
    (folder / "texts").mkdir()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        (folder / "texts" / f"{seed}.txt").write_text(" ".join(chat_folders.text(rng, 12) for _ in range(40)))


def test_the_commands_make_the_job_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer_inputs(tmp_path)
    commands = [shlex.split(each.replace("2048", "64")) for each in guide_commands(TRAINER, "## A whole job")]
    shown = ""
    for command in commands:
        done = CliRunner().invoke(make_app(), command[1:])
        assert done.exit_code == 0, done.output
        shown = done.output
    assert re.findall(r"^rank (\d)", shown, re.MULTILINE) == list("01234567")
    calls = [node for node in ast.walk(ast.parse(trainer_script())) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if ast.unparse(call.func) == "TrainingArguments"]
    old = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    assert old.keys() <= inspect.signature(TrainingArguments).parameters.keys()
    config = load_config(commands[-1][3], [word for word in commands[-1] if "=" in word])
    train, optimizer, world = config.train, config.optimizer, config.parallel.ep * config.parallel.edp
    assert f"--nproc-per-node {world} " in trainer_script()
    assert (train.micro_batch, train.steps) == (old["per_device_train_batch_size"], old["max_steps"])
    assert train.global_batch == train.micro_batch * old["gradient_accumulation_steps"] * world
    assert (optimizer.lr, optimizer.weight_decay) == (old["learning_rate"], old["weight_decay"])
    assert (*optimizer.betas, optimizer.clip_norm) == (old["adam_beta1"], old["adam_beta2"], old["max_grad_norm"])
    schedule = optimizer.schedule.model_dump()
    assert schedule == {"kind": old["lr_scheduler_type"], "warmup_steps": old["warmup_steps"], "min_ratio": 0.0}
    assert (config.checkpoint.every, config.checkpoint.keep) == (old["save_steps"], old["save_total_limit"])
    assert (config.evaluation.every, config.run.seed) == (old["eval_steps"], old["seed"])
    assert config.parallel.precision == "bf16"
    assert (old["bf16"], old["gradient_checkpointing"]) == (True, config.parallel.recompute == "block")


@pytest.mark.full
def test_the_script_of_the_trainer_trains(tmp_path: Path) -> None:
    trainer_inputs(tmp_path)
    cpu = {
        "2048": "64",
        "max_steps=1000": "max_steps=2",
        "accumulation_steps=8": "accumulation_steps=1",
        "bf16=True": "use_cpu=True",
    }
    cpu |= {'    fsdp="full_shard auto_wrap",\n': "", 'report_to="tensorboard"': "report_to=[]"}
    script = trainer_script()
    for old, new in cpu.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    (tmp_path / "train.py").write_text(script)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train_loss" in done.stdout
