"""The examples of the guides to transformers' Trainer and TRL train under torchrun. After a kill they resume and give
bit-equal results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_dist.monitor.sinks.jsonl import read_lines

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
STEPS = 6

# Runs an example whose ranks kill themselves after step 3.
KILLED = """
import os, runpy, signal, sys
from moe_dist.monitor.attached.trainer import RecordRouting

end = RecordRouting.on_step_end

def kill(self, args, state, control, **objects):
    end(self, args, state, control, **objects)
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

RecordRouting.on_step_end, sys.argv = kill, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*command: object, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    whole = [sys.executable, *launcher, *map(str, command)]
    return subprocess.run(whole, capture_output=True, text=True, timeout=600, env=environment, check=False)


@pytest.mark.full
@pytest.mark.parametrize("name", ["train_by_trainer", "train_by_trl"])
def test_an_example_resumes_after_a_kill_to_the_same_bits(name: str, tmp_path: Path) -> None:
    model, chats, script = tmp_path / "model", tmp_path / "chats.jsonl", EXAMPLES / f"{name}.py"
    made = run(EXAMPLES / "tiny_qwen3_moe.py", model, chats)
    assert made.returncode == 0, made.stderr
    whole = run(script, model, chats, tmp_path / "whole", ranks=4)
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "killed.py").write_text(KILLED)
    out = tmp_path / "out"
    killed = run(tmp_path / "killed.py", script, model, chats, out, ranks=4)
    assert killed.returncode != 0
    assert [each.name for each in out.glob("checkpoint-*")] == ["checkpoint-2"], killed.stderr
    resumed = run(script, model, chats, out, ranks=4)
    assert resumed.returncode == 0, resumed.stderr
    weights = [(folder / "model.safetensors").read_bytes() for folder in (model, tmp_path / "whole", out)]
    assert weights[0] != weights[1] == weights[2]
    lines = [*read_lines(out / "routing" / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert all(line["scalars"]["comm/bytes_sent"] > 0 for line in lines)
    events = EventAccumulator(str(out / "routing" / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert "moe/load/routed" in events.Tags()["images"]
