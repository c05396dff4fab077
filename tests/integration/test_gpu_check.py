"""Tests a whole dry run of `moe-dist gpu-check` on the CPU, and its reports on wrong kernels, crashes, hangs and
interrupted runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.invoked import invoke
from tools.gpu_check import session
from tools.gpu_check.__main__ import CHECKS, main
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Outcome
from tools.gpu_check.process import function_of
from tools.gpu_check.session import Check, run_checks

ROOT = Path(__file__).parents[2]
ONLY_ON_A_GPU = {"DeepEP", "HybridEP"}
CARD = {"card": "a card"}


def planted(*names: str, seconds: float = 600.0) -> dict[str, Check]:
    return {name: Check(f"tests.support.planted_checks:{name}", seconds, "") for name in names}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckJob:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return CheckJob(gpus=2, rehearse=True, folder=tmp_path)


def run(
    job: CheckJob, checks: dict[str, Check], *, card: dict[str, str] = CARD, minutes: float = 60.0
) -> dict[str, Outcome]:
    return run_checks(checks, job, job.folder / "results.json", card, minutes=minutes)


@pytest.mark.full
def test_a_fault_fails_its_check_and_ends_no_other(job: CheckJob) -> None:
    outcomes = run(job, planted("wrong_kernel", "crash", "lacking", "good", "missed_bar"))
    assert [each.verdict for each in outcomes.values()] == ["fail", "fail", "not possible", "pass", "fail"]
    assert "the output of experts of the Triton kernels differs from torch's by 0.1" in outcomes["wrong_kernel"].reason
    assert outcomes["crash"].reason.startswith("the process was ended by SIGSEGV")
    assert outcomes["lacking"].reason == "no such card"
    assert outcomes["missed_bar"].reason == "difference nan (<= 0.001); rate 5 (>= 6)"
    saved = json.loads((job.folder / "results.json").read_text())
    assert saved["header"]["card"] == "a card"
    assert {name: each["verdict"] for name, each in saved["checks"].items()} == {
        name: each.verdict for name, each in outcomes.items()
    }


@pytest.mark.full  # starts a process that imports torch
def test_a_hang_ends_at_its_limit_and_says_where(job: CheckJob) -> None:
    reason = run(job, planted("hang", seconds=1.0))["hang"].reason
    assert reason.startswith("no result within 1 s")
    assert "in hang" in reason


def in_this_process(name: str, target: str, job: CheckJob) -> Outcome:
    try:
        return Outcome.of(function_of(target)(job))
    except NotPossibleError as error:
        return Outcome("not possible", str(error))


def test_a_cut_run_goes_on_and_another_card_begins_anew(job: CheckJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "run_check", in_this_process)  # the tests above run each check in a process of its own
    runs = job.folder / "runs"
    first = run(job, planted("good"))
    cut = run(job, planted("good", "lacking"), minutes=0.0)
    assert cut["good"] == first["good"]
    assert cut["lacking"].verdict == "not run"
    assert run(job, planted("good", "lacking"))["lacking"].verdict == "not possible"
    late = run(job, planted("good", "missed_bar"), minutes=0.3)["missed_bar"]
    assert late.verdict == "not run", "a failure just before the end of the time may be a timeout"
    assert runs.read_text() == "run\n"
    run(job, planted("good"), card={"card": "another"})
    run(replace(job, gpus=1), planted("good"))
    assert runs.read_text() == "run\n" * 3


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "moe_dist", "gpu-check", *arguments]
    return subprocess.run(program, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_without_a_gpu_the_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the command adds variables
    monkeypatch.setattr("tools.gpu_check.__main__.run_check", in_this_process)
    done = invoke(main, "--json", tmp_path / "results.json", code=69)
    assert "sees no GPU" in done.stderr
    assert "--rehearse" in done.stderr


@pytest.mark.exhaustive
def test_the_whole_rehearsal_passes(tmp_path: Path) -> None:
    arguments = ("--rehearse", "--minutes", "60", "--json", str(tmp_path / "results.json"))
    done = command(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "results.json").read_text())["checks"]
    assert {name: each["verdict"] for name, each in checks.items()} == {
        name: "not possible" if name in ONLY_ON_A_GPU else "pass" for name in CHECKS
    }
    assert all(each["readings"] for name, each in checks.items() if name not in ONLY_ON_A_GPU)
    again = command(*arguments)
    assert again.returncode == 0
    assert json.loads((tmp_path / "results.json").read_text())["checks"] == checks


@pytest.mark.gpu
@pytest.mark.needs_hardware
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_all_checks_on_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")  # other tests set it for the CPU
    done = command("--minutes", "14", "--json", str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stdout + done.stderr
