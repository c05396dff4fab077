"""Checks that a checkpoint is complete and undamaged: every tensor exists once, has the right shape, is finite, and has the
saved bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.checkpoint.contents import examine_files
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.index import MAX_FAULTS, StateFile
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, TensorSpec
from moe_dist.errors import ConfigError, DataError
from moe_dist.runtime.command_line import reports_errors, run_command


@reports_errors("verify_checkpoint")
def main(
    path: Annotated[Path, typer.Argument(help="A checkpoint (step_N), a folder of checkpoints, or a run: its newest.")],
    every: Annotated[bool, typer.Option("--every", help="List every fault, not only the first ones.")] = False,
) -> None:
    """Read every byte of a checkpoint and list its faults. Ends with exit code 0 without a fault, and with 65 otherwise."""
    from moe_dist.checkpoint.verify import verify

    folder = find_checkpoint(path)
    state = examine_files(folder).state
    specs, doubt = _expected(state)
    examined, problems = verify(folder, specs)
    base = _look_at_base(state, folder)
    if problems:
        for problem in problems if every else problems[:MAX_FAULTS]:
            print(problem)
        if not every and len(problems) > MAX_FAULTS:
            print(f"and {len(problems) - MAX_FAULTS} more (--every)")
        print(f"{folder}: {len(problems)} faults")
        raise typer.Exit(DataError.exit_code)
    assert examined.index is not None
    print(
        f"{folder}: step {examined.index.step}, {len(examined.index.tensors)} tensors in {examined.index.num_shards} files"
    )
    print(f"each is there once, finite, and what was saved{doubt}")
    if base is not None:
        print(f"its base {base} is there, with the content hash that the adapters name; verify it by itself")


def _look_at_base(state: StateFile | None, folder: Path) -> Path | None:
    """Returns the base checkpoint (the frozen weights) of a checkpoint of adapters; None for other checkpoints."""
    from moe_dist.checkpoint.base import KEY, Base, find_base

    if state is None or KEY not in state.values:
        return None
    return find_base(Base.noted(state.values, folder), folder).folder


def _expected(state: StateFile | None) -> tuple[Mapping[str, TensorSpec] | None, str]:
    """Returns the tensors that a checkpoint must have according to its configuration. If the checkpoint has no readable
    configuration, returns None and a remark."""
    from moe_dist.config.partial import read_stored
    from moe_dist.config.schema import Config
    from moe_dist.train.build.training import state_specs

    saved = state.values.get("config") if state is not None else None
    try:
        if not isinstance(saved, dict):
            return None, "; it has no configuration to tell which tensors there should be"
        specs = state_specs(read_stored(Config, saved))
        if state is not None and state.optimizer_steps is None:  # saved without an optimizer, such as an import
            specs = {name: spec for name, spec in specs.items() if not name.startswith(OPTIMIZER_PREFIX)}
        return specs, ""
    except ConfigError as error:
        said = "; ".join(error.problems)
        return None, f"; its configuration cannot be read by this version, so tensors may be missing ({said})"


if __name__ == "__main__":
    run_command(main)
