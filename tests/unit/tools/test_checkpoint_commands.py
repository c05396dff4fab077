"""Runs verify_checkpoint and inspect_checkpoint as users do, and tests their output and exit codes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_dist.checkpoint.index import MAX_FAULTS, read_index
from tests.support.invoked import invoke
from tests.support.one_rank import OneRank, world_of_one
from tests.support.small_run import SmallRun
from tests.support.tiny import tiny_config
from tools import inspect_checkpoint, verify_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def checkpoints(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The checkpoints of a run of two steps. Tests must not write to them."""
    with world_of_one():
        run = OneRank(tiny_data, tmp_path_factory.mktemp("runs"))
        run.train_and_save()
        yield run.folder


def flipped(folder: Path) -> Path:
    """Flips the last bit of the last tensor. Returns the file."""
    shard = folder / "shard_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    return shard


@pytest.mark.parametrize("way", ["step_2", ".", ".."])
def test_a_whole_checkpoint_is_0_whatever_the_path_names(checkpoints: Path, way: str) -> None:
    done = invoke(verify_checkpoint.main, (checkpoints / way).resolve())
    tensors = len(read_index(checkpoints / "step_2").tensors)
    assert done.exit_code == 0, done.output
    assert f"{checkpoints / 'step_2'}: step 2, {tensors} tensors in 1 files" in done.stdout
    assert done.stdout.endswith("each is there once, finite, and what was saved\n")


def test_a_damaged_checkpoint_is_65_with_file_and_tensor(tmp_path: Path) -> None:
    folder = SmallRun(tmp_path).train(1).save(1)
    done = invoke(verify_checkpoint.main, tmp_path)
    assert (done.exit_code, "it has no configuration to tell which tensors" in done.stdout) == (0, True)
    flipped(folder)
    done = invoke(verify_checkpoint.main, tmp_path, code=65)
    assert done.stdout.splitlines() == [
        "damaged: shard_00000.safetensors: optimizer.exp_avg_sq.2.weight: its bits differ from those that were saved",
        f"{folder}: 1 faults",
    ]


def test_what_the_configuration_calls_for_and_is_not_there_is_65(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path).model_dump(mode="json")
    SmallRun(tmp_path).train(1).save(1, config=config)
    done, every = invoke(verify_checkpoint.main, tmp_path), invoke(verify_checkpoint.main, tmp_path, "--every")
    assert done.exit_code == every.exit_code == 65
    for problem in (
        "incomplete: index.json: layers.1.moe.experts.image.1.gate: in the model, but not in the checkpoint",
        "foreign: index.json: 0.weight: in the checkpoint, but not in the model",
    ):
        assert problem in every.stdout
    shown, told = done.stdout.splitlines(), every.stdout.splitlines()
    assert shown[:MAX_FAULTS] == told[:MAX_FAULTS]
    assert shown[MAX_FAULTS] == f"and {len(told) - 1 - MAX_FAULTS} more (--every)"


def test_what_is_in_a_checkpoint_is_shown(checkpoints: Path) -> None:
    done = invoke(inspect_checkpoint.main, checkpoints.parent, "--tensors", code=0)
    index = read_index(checkpoints / "step_2")
    for wanted in (
        "2, 2 of them by the optimizer",
        "1 ranks: ep 1 x edp 1, ddp, interleaved",
        "EP rank 0: text/0 text/1 text/2 image/0 image/1",
        "2 layers x 3 experts x down, gate, up",
        f"layers.0.moe.experts.text.2.up  F32 [16, 32]  {index.tensors['layers.0.moe.experts.text.2.up'].fingerprint}",
    ):
        assert wanted in done.stdout, (wanted, done.stdout)
    listed = [line.partition(" ")[0] for line in done.stdout.splitlines() if line.endswith("shard_00000.safetensors")]
    assert listed == list(index.tensors)


def test_a_checkpoint_cut_short_is_65_to_look_at(tmp_path: Path) -> None:
    shard = flipped(SmallRun(tmp_path).train(1).save(1))
    assert invoke(inspect_checkpoint.main, tmp_path).exit_code == 0, "it reads no tensor"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = invoke(inspect_checkpoint.main, tmp_path)
    assert (done.exit_code, done.stdout) == (65, "")
    assert "truncated: shard_00000.safetensors" in done.stderr


def test_a_checkpoint_is_looked_at_without_torch(checkpoints: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from tools.inspect_checkpoint import main; "
        "from moe_dist.runtime.command_line import run_command; run_command(main)"
    )
    command = [sys.executable, "-c", code, str(checkpoints)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "EP rank 0" in done.stdout
