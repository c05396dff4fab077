"""The command `moe-dist`, also `python -m moe_dist`. A subcommand is imported when it is called: help needs no torch."""

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from moe_dist.config.bundled import source_root
from moe_dist.runtime.command_line import command_app
from moe_dist.runtime.renamed import RENAMED

# Subcommand, the function that it calls, its line in the help. Options and their help stand at the function alone.
COMMANDS = (
    ("launch local", "launchers.local:main", "Run on this machine, one process a rank."),
    ("launch slurm", "launchers.slurm.__main__:main", "Submit a run to a Slurm cluster."),
    ("launch ray", "launchers.ray.__main__:main", "Run on a Ray cluster, or submit a run to one."),
    ("train", "moe_dist.train.__main__:main", "Be one rank of a run, as torchrun starts it."),
    ("status", "launchers.status:main", "Show what runs are doing."),
    ("doctor", "tools.doctor:main", "Check whether a run can run where it is to."),
    ("explain", "moe_dist.config.__main__:explain", "Print type, default and meaning of a key."),
    ("show", "moe_dist.config.__main__:show", "Print a whole configuration, defaults included."),
    ("prepare-data", "tools.prepare_data:main", "Prepare the default data, or your own."),
    ("prepare-router-tuning", "tools.prepare_router_tuning:main", "Make the samples that router tuning learns from."),
    ("evaluate", "tools.evaluate:main", "Ask a trained run multiple-choice questions."),
    ("generate", "tools.generate:main", "Continue text and pictures with a trained run."),
    ("import-hf", "tools.import_hf:main", "Turn a Hugging Face model into weights to begin with."),
    ("export-hf", "tools.export_hf:main", "Write a checkpoint as a Hugging Face model."),
    ("inspect", "tools.inspect_checkpoint:main", "Show what a checkpoint holds."),
    ("verify", "tools.verify_checkpoint:main", "Check every byte of a checkpoint."),
    ("compare", "tools.compare_runs:main", "Compare the records of runs."),
    ("bench", "tools.bench.__main__:main", "Measure dispatch on this machine."),
    ("reproduce", "tools.experiments.__main__:main", "Run an experiment of configs/reproduce, and report."),
)


class LazyGroup(TyperGroup):
    """Shows the lines of COMMANDS, and takes a subcommand's options from its function once it is called or completed."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Name, command and remaining arguments; the name of a module ends with its subcommand's."""
        if args[0] not in self.commands and (words := _words_of(args[0])):
            ctx.fail(f"{args[0]} is now `moe-dist {words}`")
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None or isinstance(command, LazyGroup) else load_subcommand(name), rest


def _words_of(name: str) -> str | None:
    """The subcommand of a module, whose name may be an old one, and may lack its package."""
    name = name.replace("-", "_")
    found = {target.partition(":")[0].removesuffix(".__main__"): words for words, target, _ in COMMANDS}
    module = RENAMED.get(name) or RENAMED.get(f"tools.{name}") or name
    return next((words for each, words in found.items() if module in (each, each.rpartition(".")[2])), None)


def load_subcommand(name: str) -> Any:
    """The typer command of a subcommand."""
    root = str(source_root())  # launchers and tools lie there, under the names that a clone has too
    if root not in sys.path:
        sys.path.insert(0, root)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [root, os.environ.get("PYTHONPATH")])
        )  # for child processes
    module, _, function = next(target for words, target, _ in COMMANDS if words.split()[-1] == name).partition(":")
    command = typer.main.get_command(command_app(getattr(importlib.import_module(module), function)))
    command.name = name
    return command


def _make_app() -> typer.Typer:
    app = typer.Typer(
        cls=LazyGroup,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Train mixture-of-experts transformers with expert parallelism.",
    )
    launch = typer.Typer(
        cls=LazyGroup,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Start a run here or on a cluster: local, slurm, ray.",
    )
    app.add_typer(launch, name="launch")
    for words, _, line in COMMANDS:
        group, _, name = words.rpartition(" ")
        (launch if group else app).command(name, help=line)(lambda: None)
    return app


def main() -> None:
    """The entry point."""
    _make_app()(prog_name="moe-dist")


if __name__ == "__main__":
    main()
