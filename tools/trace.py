"""Writes a trace of a trained run: the experts that each held-out token takes. See docs/monitoring.md."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from moe_dist.config.trace_schema import untraceable
from moe_dist.errors import ConfigError
from moe_dist.inference.loaded_run import LoadedRun, RunOptions, choose_device, placement_for_use, trained_placement
from moe_dist.parallel.mesh import one_group
from moe_dist.runtime.command_line import print_done, reports_errors, run_command, takes
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.files import make_writable
from moe_dist.runtime.ownership import refuse_planted_files
from moe_dist.train.step.tracing import trace_heldout


@dataclass(frozen=True, kw_only=True)
class TraceOptions(RunOptions):
    sequences: Annotated[int, typer.Option(min=1, help="Held-out sequences of each source.")] = 64
    weights: Annotated[bool, typer.Option(help="Also store the weight of each choice.")] = True
    out: Annotated[Path | None, typer.Option(help="New folder; by default `traces/step_N` in the run.")] = None


@reports_errors("trace")
@takes(TraceOptions)
def main(options: TraceOptions) -> None:
    """Trace held-out tokens of a trained run, on one rank, or under torchrun on several ranks that share the experts."""
    write_trace(options)


def write_trace(options: TraceOptions) -> None:
    """Writes a trace and prints its folder. Raises ConfigError if a run cannot be traced, or its trace exists."""
    env = RankEnv.from_environment(os.environ)
    device = choose_device(options.device)
    trained = options.find(lambda config: [f"{key}: {reason}; trace another run" for key, reason in untraceable(config)])
    if not any(source.valid for source in trained.manifest.sources.values()):
        raise ConfigError(f"{trained.config.data.path}: no source of its manifest has a held-out split (valid); add one")
    folder = _folder(options, trained)
    groups = placement_for_use(trained.config, 1).groups
    placement = trained_placement(trained.folder, groups)
    with one_group(env, device) as (mesh, device):  # every rank has checked that the folder is new
        tokens = trace_heldout(
            trained.load(device, mesh),
            folder / "heldout",
            env,
            config=trained.config,
            data=trained.manifest,
            groups=groups,
            rank_of_expert=placement.rank_of_expert,
            group_of_modality=torch.tensor(trained.group_of_modality, device=device),
            step=trained.step,
            sequences=options.sequences,
            weights=options.weights,
        )
    if env.rank == 0:
        ranks = f" on each of {env.world_size} ranks" if env.world_size > 1 else ""
        print_done(f"{folder}: {tokens:,} held-out tokens{ranks}; show them with moe-dist report {folder}")


def _folder(options: TraceOptions, trained: LoadedRun) -> Path:
    """Returns the folder of the trace, which must not exist, and makes its parent before the model is loaded."""
    if options.out is None:
        refuse_planted_files(trained.run_folder)
    folder = options.out or trained.run_folder / "traces" / f"step_{trained.step}"
    if folder.exists():
        raise ConfigError(f"--out {folder}: it exists, and a trace is never overwritten; give a new folder, or remove it")
    make_writable(folder.parent, option=f"--out {folder}")
    return folder


if __name__ == "__main__":
    run_command(main)
