"""Writes run folders beside this file (see README.md): three small runs of four steps, and records of three later steps."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.tiny import tiny_config, tiny_dataset, write_config

SMALL = {
    "model.hidden_dim": 8,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "checkpoint.keep": 1,
    "monitor.sinks": [{"kind": "jsonl"}, {"kind": "tensorboard", "pictures_every": 2}],
}


def group(experts: int, top_k: int, width: int, **more: int) -> dict[str, int]:
    return {"num_experts": experts, "top_k": top_k, "ffn_dim": width, **more}


RUNS: dict[str, dict[str, Any]] = {
    "top_k": {
        "model.moe.groups": {
            "text": group(3, 2, 4, num_null=1, num_identity=1),
            "image": group(2, 2, 6, num_null=2, num_constant=1),
        },
        "model.moe.router": {"kind": "top_k", "selection_bias": True},
        "model.moe.balance": [
            {"kind": "load_target", "target": {"text": 1.0, "image": 0.8}, "rate": 0.1},
            {"kind": "loss_free"},
        ],
        "model.moe.capacity": {"factor": 1.5},
    },
    "expert_choice": {
        "model.moe.groups": {"text": group(2, 1, 4), "image": group(2, 1, 6)},
        "model.moe.router": {"kind": "expert_choice", "causal": "threshold"},
        "model.depths": {"every": 2, "capacity": 0.5, "causal": "threshold", "set": "rank"},
        "evaluation.calibration": 2,
        "loss.balance": {"schedule": [[0, 0.0]]},
        "placement": {"policy": "interleaved"},
    },
}


def main() -> None:
    tiny_dataset(Path("data"))
    for name, changes in RUNS.items():
        config = write_config(
            tiny_config(Path("data"), Path("runs"), {**SMALL, "run.name": name, **changes}), Path(f"{name}.yaml")
        )
        run, kept = Path("runs") / name, Path("out") / name
        for steps in (4, 7):
            subprocess.run([sys.executable, "-m", "launchers.local", str(config), f"train.steps={steps}"], check=True)
            if steps == 4:
                shutil.copytree(
                    run, kept, ignore=shutil.ignore_patterns("log", "tensorboard", "*.json.*", ".*", "provenance.json")
                )
        before = (kept / "metrics.jsonl").read_text()
        (kept / "continued.jsonl").write_text((run / "metrics.jsonl").read_text().removeprefix(before))


if __name__ == "__main__":
    main()
