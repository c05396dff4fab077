"""Checks moe_dist on the GPUs of this machine: python -m tools.gpu_check [--gpus N] [--minutes 9]"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moe_dist.errors import EXIT_DONE, EXIT_FAILED, ResourceError, StoppedError
from moe_dist.runtime.command_line import reports_errors, run_command, takes
from moe_dist.runtime.environment import limit_fragmentation
from moe_dist.runtime.files import make_writable
from tools.gpu_check.outcome import CheckJob, Outcome
from tools.gpu_check.process import run_check
from tools.gpu_check.session import Check, run_checks

CHECKS: Mapping[str, Check] = {
    "modules": Check("tools.gpu_check.machine:modules", 90, "every module imports; the presets for GPUs build"),
    "kernels": Check("tools.gpu_check.kernels:kernels", 120, "Triton kernels = torch in float64, values and gradients"),
    "attention": Check("tools.gpu_check.layers:attention", 240, "attention inside documents = dense masks in float64"),
    "layer": Check("tools.gpu_check.layers:layer", 90, "MoE layer on the GPU = on the CPU in float64"),
    "races": Check("tools.gpu_check.races:races", 180, "no operation touches rows that an exchange has in flight"),
    "dispatch": Check("tools.gpu_check.layers:dispatch", 150, "layer on N ranks = on one rank of the CPU, in float64"),
    "DeepEP": Check("tools.gpu_check.gpus:deep_ep", 120, "layer over DeepEP V2 = in float64"),
    "HybridEP": Check("tools.gpu_check.gpus:hybrid_ep", 120, "layer over HybridEP = in float64"),
    "steps": Check("tools.gpu_check.training:steps", 240, "training steps, DDP and FSDP2, fp32 and bf16 = fp32 on the CPU"),
    "repeat": Check("tools.gpu_check.training:repeat", 180, "a run repeats bit for bit, also across a checkpoint"),
    "generation": Check("tools.gpu_check.training:generation", 60, "generated tokens = those of the CPU"),
}
_STYLES = {"pass": "green", "fail": "bold red", "not possible": "dim", "not run": "yellow"}


@dataclass(frozen=True)
class GpuCheckOptions:
    gpus: Annotated[int | None, typer.Option(min=1, help="Number of GPUs; by default all that torch sees.")] = None
    minutes: Annotated[float, typer.Option(min=0, help="Time for all checks; the same command goes on later.")] = 9.0
    json: Annotated[Path, typer.Option(help="File of the results.")] = Path("gpu_check.json")
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Run all checks on the CPU, with tiny shapes.")] = False
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what the file has results of.")] = False


@reports_errors("gpu-check")
@takes(GpuCheckOptions)
def main(options: GpuCheckOptions) -> None:
    """Check results on GPUs; print a table and write JSON. The exit code is 0 if no check failed, 1 if one did,
    75 if time was over before the last check, and 69 without a GPU."""
    take_checks(CHECKS, options)


def take_checks(all_checks: Mapping[str, Check], options: GpuCheckOptions) -> None:
    """Runs checks, prints their table, and exits."""
    gpus, rehearse, json = options.gpus, options.rehearse, options.json
    # The checks' processes read these variables. With NVML, torch counts GPUs without initialising CUDA, which does not
    # survive a fork.
    interpreted = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    os.environ |= interpreted if rehearse else {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    limit_fragmentation(os.environ)  # a run's launcher does the same
    console = Console(highlight=False, soft_wrap=True)
    job = CheckJob(gpus or 2, rehearse, json.with_name(f"{json.stem}_logs"))
    make_writable(job.folder, option=f"--json {json}")
    found: dict[str, object] = {"card": "CPU, rehearsal"}
    if not rehearse:
        job, found = _with_card(job, gpus)
    console.print(f"{job.gpus} x {found['card']}: {json}, logs in {job.folder}")

    def show(name: str, outcome: Outcome) -> None:
        reason = f"  {outcome.reason}" if outcome.reason else ""
        console.print(f"[{_STYLES[outcome.verdict]}]{outcome.verdict}[/]  {name}  {outcome.seconds:.1f} s", end="")
        console.print(reason, markup=False)

    # The time limits in CHECKS are for a GPU; on a busy CPU a check takes longer.
    checks = {name: replace(each, seconds=600.0) for name, each in all_checks.items()} if rehearse else all_checks
    outcomes = run_checks(checks, job, json, found, minutes=options.minutes, fresh=options.fresh, show=show)
    console.print(table(f"{job.gpus} x {found['card']}", checks, outcomes))
    verdicts = {each.verdict for each in outcomes.values()}
    raise typer.Exit(EXIT_FAILED if "fail" in verdicts else StoppedError.exit_code if "not run" in verdicts else EXIT_DONE)


def _with_card(job: CheckJob, gpus: int | None) -> tuple[CheckJob, dict[str, object]]:
    """Reads the card's facts in another process, because this process must not touch CUDA before it forks the checks'
    processes."""
    outcome = run_check("card", "tools.gpu_check.machine:card", replace(job, seconds=120.0))
    if outcome.verdict != "pass":
        raise ResourceError(f"{outcome.reason}; to run the checks on the CPU, give --rehearse")
    count, name = int(outcome.readings[0].value), outcome.readings[0].unit
    if (gpus or 1) > count:
        raise ResourceError(f"--gpus {gpus}: torch sees {count} GPUs; give fewer, or look at CUDA_VISIBLE_DEVICES")
    facts = {each.what: each.unit for each in outcome.readings[1:]}
    return replace(job, gpus=gpus or count, card=name), {"card": name, **facts}


def table(title: str, checks: Mapping[str, Check], outcomes: dict[str, Outcome]) -> Table:
    """Returns a table of all checks with their readings."""
    made = Table(title=title)
    for column in ("check", "result", "s", "readings"):
        made.add_column(column, justify="right" if column == "s" else "left")
    for name, outcome in outcomes.items():
        lines = [str(each) for each in outcome.readings] or [outcome.reason]
        verdict = f"[{_STYLES[outcome.verdict]}]{outcome.verdict}[/]"
        made.add_row(
            f"{name}: {checks[name].says}", verdict, f"{outcome.seconds:.1f}", "\n".join(lines).replace("[", r"\[")
        )
    return made


if __name__ == "__main__":
    run_command(main)
