"""All pairs of options on fake CUDA tensors: steps, evaluation and saves of a tiny model, as one of 8 ranks.

All of them take two to six minutes of CPU time, by machine.
"""

import json
from pathlib import Path

import pytest

from tests.support.fake_matrix import FACTORS, overrides
from tools.fake_gpu.fake_cuda import child

ROUTING = {"split sizes", "split sizes of both hops", "tokens of each rank and group", "LoRA pairs of each expert"}
CASES = 28  # the first, which have most pairs
READS = {
    "first step": {*ROUTING, "step"},
    "step": {*ROUTING, "step"},
    "evaluation": {*ROUTING, "heldout", "mixture_of_depths"},
    "first save": {"storage", "optimizer", "state of the device's generator", "step_load"},
    "save": {"storage", "optimizer", "state of the device's generator", "step_load"},
}


@pytest.mark.exhaustive
def test_pairs_of_options_run_on_the_device_or_are_refused_by_name() -> None:
    done = child("tests.support.fake_matrix", [str(CASES)])
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    refused, cases = ([each for each in lines if key in each] for key in ("pair", "options"))
    assert (len(cases), len(refused)) == (CASES, 37)
    seen = {value for case in cases for value in case["options"].items()}
    assert seen == {(factor, value) for factor, values in FACTORS.items() for value in values}
    for each in refused:
        fields = [change.partition("=")[0] for change in overrides(dict(each["pair"]), Path())]
        assert any(problem.startswith(field) for problem in each["problems"] for field in fields), each
    assert not [(case["options"], problem) for case in cases for problem in _problems(case)]


def _problems(case: dict) -> list[object]:
    if "error" in case:
        return [case["error"]]
    found: list[object] = [] if case["first rank"] == case["first step"]["order"] else ["order of collectives"]
    for phase, named in READS.items():
        seen = case[phase]
        found += [(phase, "reads", name) for name in seen["reads"].keys() - named]
        found += [(phase, "mixes devices", line) for line in seen["mixed"]]
        if phase not in ("first step", "first save"):
            # tables of a plan, made once; where counts are known, the evaluation is the first to need them
            once = {"planning"} if phase == "evaluation" else set()
            found += [(phase, "waits for a copy", line) for line in seen["copies"].keys() - once]
    if case["step"]["reads"]["step"] != 2:
        found.append(("step", case["step"]["reads"]))
    return found + [name for name in ("on host", "same memory") if not case["snapshot"][name]]
