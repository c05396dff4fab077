"""Counts the files that a reader enters to follow one training step, from the loop on rank 0 through loader, model, loss
and optimizer to the records. The test traces steps of the default job, of MoMa and of DeepSeek-V3."""

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

import moe_dist
from tests.support.cover import rest_full
from tests.support.one_rank import OneRank, world_of_one

MOST = 40
ROOM = Path(moe_dist.__file__).parent
CONFIGS = ROOM.parent / "configs"
# The settings of DeepSeek-V3, as an import configures its models (docs/huggingface.md).
DEEPSEEK = {
    "model.moe.router": {"kind": "group_limited", "n_group": 2, "topk_group": 1, "scale": 2.5},
    "model.moe.balance": [{"kind": "loss_free", "rate": 0.001}],
    "model.moe.groups": {"all": {"num_experts": 4, "top_k": 2, "ffn_dim": 16, "modalities": ["text", "image"]}},
    "model.moe.shared_ffn_dim": 16,
    "model.moe.first": 1,
    "model.dense_ffn_dim": 32,
    "model.num_kv_heads": 4,
    "model.attention": {"kind": "latent", "q_rank": 8, "kv_rank": 8, "value_dim": 8},
    "model.head_dim": 12,
    "model.rope_dim": 4,
}


def preset(name: str) -> dict[str, Any]:
    """Returns the settings of a file in configs/ that decide how a step is computed, with fewer and smaller experts."""
    values: Mapping[str, Any] = yaml.safe_load((CONFIGS / name).read_text())
    moe = values["model"]["moe"]
    fewer = {"num_experts": 4, "ffn_dim": 16}
    groups = {key: {**group, **fewer, "top_k": min(group["top_k"], 4)} for key, group in moe["groups"].items()}
    evaluation = {key: value for key, value in values["evaluation"].items() if key not in ("checks", "final_sequences")}
    return {
        "model.moe": {**moe, "groups": groups},
        "loss": values["loss"],
        "optimizer": values["optimizer"],
        "evaluation": {**evaluation, "sequences": 4},
        "monitor": values.get("monitor", {}),
    }


JOBS = {"default": preset("adamoe_moma_tiny_cpu.yaml"), "moma": preset("moma_tiny_cpu.yaml"), "deepseek_v3": DEEPSEEK}


def files_entered(action: Callable[[], Any]) -> set[str]:
    """Returns the files of moe_dist in which a function is called, on any thread, because autograd runs the backward pass
    in its own threads."""
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {str(Path(name).relative_to(ROOM)) for name in entered if name.startswith(f"{ROOM}/")}


@pytest.mark.parametrize("job", rest_full(JOBS))
def test_a_step_is_followed_in_few_files(job: str, tiny_data: Path, tmp_path: Path) -> None:
    sinks = [{"kind": "console", "every": 1}, {"kind": "jsonl"}, {"kind": "tensorboard"}]
    changes = {**JOBS[job], "monitor.sinks": sinks}
    with world_of_one(), OneRank(tiny_data, tmp_path, **changes).trainer() as trainer:
        for _ in range(2):  # they fill caches; TensorBoard's last new tag comes in the second step
            trainer._step()
        entered = files_entered(trainer._step)
    assert {
        "train/loop/trainer.py",
        "train/step/training_step.py",
        "moe/layer.py",
        "data/loader.py",
        "monitor/sinks/jsonl.py",
    } <= entered
    assert len(entered) <= MOST, "\n".join(sorted(entered))
