"""Runs of transformers' models from folders are started by the launcher, lose a rank, resume, and are exported."""

import json
from pathlib import Path
from typing import Any

import pytest

from launchers.local import launch
from moe_dist.monitor.tags import reproducible_part
from moe_dist.runtime.run_folder import RunFolder
from tests.support.faults import PROGRAM, fault
from tests.support.hosted import FAMILIES, UNEVEN, hosted_config
from tests.support.invoked import invoke
from tests.support.tiny import write_config
from tools.export_hf import main as export_hf

SETTINGS: dict[str, Any] = {
    **UNEVEN,
    "train.steps": 6,
    "loss.balance.scope": "step",
    "checkpoint": {"every": 2, "asynchronous": False},
    "evaluation.every": 100,
    "monitor.sinks": [{"kind": "jsonl"}, {"kind": "tensorboard"}],
}


@pytest.mark.full
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_run_from_a_folder_loses_a_rank_and_goes_on(tiny_data: Path, tmp_path: Path, family: str) -> None:
    """Ranks have 5 and 3 experts. The records of both attempts equal the records of a run that loses no rank."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    folder, out = tmp_path / "folder", tmp_path / "out"
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FAMILIES[family])).save_pretrained(folder)

    def started(name: str) -> tuple[int, RunFolder]:
        config = hosted_config(tiny_data, tmp_path / "runs", {"folder": str(folder)}, {**SETTINGS, "run.name": name})
        return launch(write_config(config, tmp_path / f"{name}.yaml"), program=PROGRAM), RunFolder.of(config)

    code, whole = started("undisturbed")
    assert code == 0
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in fault(rank=1, step=4, phase="before_step", kind="kill").items():
            patch.setenv(variable, value)
        assert started("broken")[0] not in (0, 75)
    code, run = started("broken")
    assert code == 0
    assert [each.verdict == 0 for each in run.read_status().attempts] == [False, True]
    assert records(run) == records(whole)
    assert list(run.path.rglob("events.out.tfevents.*"))
    assert invoke(export_hf, run.path, "--out", out).exit_code == 0
    AutoModelForCausalLM.from_pretrained(out)


def records(run: RunFolder) -> list[dict[str, Any]]:
    lines = map(json.loads, run.metrics_jsonl.read_text().splitlines())
    return [reproducible_part(line) for line in lines if line["kind"] != "hint"]  # some hints depend on times
