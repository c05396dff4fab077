"""Shows the system in five minutes: prepares the default data, trains a short run on CPUs, traces it and draws its report.

Every part that is finished is kept, so that an interrupted command goes on when it is called again.
"""

import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from launchers.local import launch
from moe_dist.config.bundled import find_config
from moe_dist.runtime.command_line import RUN_FOLDER_FIX, reports_errors, run_command, takes
from moe_dist.runtime.files import make_writable
from tools.prepare_data import PrepareOptions, make_data_set
from tools.report import ReportOptions, draw

CONFIG = "adamoe_moma_tiny_cpu"
STEPS = 400  # after these steps drawn cells of a picture take 1.3 true experts, and its background 0.8
LOOK_AT = """
Look at these panels of {report}:
- Compute maps: drawn cells of a picture take more true experts than its background.
- Load by layer and expert: text and pictures have experts on ranks of their own.
- Byte ledger: what these choices send with this placement, and with others.
The curves: tensorboard --logdir {runs}. The whole job, 800 steps with its checks: moe-dist launch local {config}."""


@dataclass(frozen=True)
class DemoOptions:
    out: Annotated[Path, typer.Argument(help="Folder for data and run.")] = Path("moe_dist_demo")
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = STEPS
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the report in a browser, if there is one.")] = (
        True
    )


@reports_errors("demo", storage=RUN_FOLDER_FIX)
@takes(DemoOptions)
def main(options: DemoOptions) -> None:
    """Train a small model on pictures and text, and draw how it routes them: five minutes on two cores."""
    make_writable(options.out, option=str(options.out))
    data, runs = options.out / "data", options.out / "runs"
    make_data_set(PrepareOptions(out=data))
    shorter = {"train.steps": options.steps, "evaluation.every": options.steps, "evaluation.final_sequences": 64}
    quiet = {"evaluation.ablate_experts": False, "evaluation.checks": "[]", "monitor.cost_table": False}
    own = {"data.path": data.absolute(), "run.root": runs.absolute(), "run.name": "demo"}
    code = launch(find_config(CONFIG), [f"{key}={value}" for key, value in {**own, **shorter, **quiet}.items()])
    if code:
        raise typer.Exit(code)
    report = draw(ReportOptions(path=runs / "demo"))
    print(LOOK_AT.format(report=report, runs=runs, config=CONFIG))
    if options.open_page and sys.stdout.isatty():
        webbrowser.open(report.absolute().as_uri())


if __name__ == "__main__":
    run_command(main)
