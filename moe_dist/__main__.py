"""The command `moe-dist`, also `python -m moe_dist`. Help texts need no torch, because the module of a subcommand is
imported only when the subcommand runs."""

import importlib
import sys
from itertools import chain
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError as error:
    sys.exit(
        f"{sys.executable} lacks the package {error.name}; start the Python that moe_dist was installed for (README.md)"
    )
from typer.core import TyperGroup

from moe_dist.config.bundled import add_to_path, source_root
from moe_dist.runtime.command_line import HELP_OPTIONS, command_app, print_version

# Subcommands by use. Each entry consists of a subcommand, its function, and its line in the help text. The function also
# defines the subcommand's options. `commands` adds the launchers of `launchers/table.py`.
COMMANDS = {
    "Start and look": (
        ("demo", "tools.demo:main", "Train and draw a small model in five minutes."),
        ("configs", "launchers.explain:configs", "List the configurations of this package."),
        ("status", "launchers.status:main", "Show the state of runs."),
        ("report", "tools.report:main", "Draw the routing of a run or a trace as HTML."),
    ),
    "Models": (
        ("import-hf", "tools.import_hf:main", "Convert a Hugging Face model into starting weights."),
        ("export-hf", "tools.export_hf:main", "Convert a checkpoint into a Hugging Face model."),
        ("verify-export", "tools.verify_export:main", "Check that an exported folder brings no foreign code."),
        ("evaluate", "tools.evaluate:main", "Test a trained run with multiple-choice questions."),
        ("generate", "tools.generate:main", "Continue text and pictures with a trained run."),
    ),
    "Data": (
        ("prepare-data", "tools.prepare_data:main", "Prepare the default data or your own data."),
        ("train-image-tokenizer", "tools.train_image_tokenizer:main", "Train a small VQ model for pictures as tokens."),
        ("prepare-router-tuning", "tools.prepare_router_tuning:main", "Make the samples for router tuning."),
    ),
    "Plan": (
        ("plan", "tools.plan:main", "Rank layouts by simulated step time."),
        ("calibrate", "tools.calibrate:main", "Measure the rates of this machine for plan."),
        ("explain", "launchers.explain:main", "Print type, default and meaning of a key."),
        ("show", "launchers.explain:show", "Print a whole configuration, defaults included."),
    ),
    "Check": (
        ("doctor", "launchers.doctor.__main__:main", "Check a machine or cluster for a run."),
        ("gpu-check", "tools.gpu_check.__main__:main", "Check results on the GPUs of this machine."),
        ("verify", "tools.verify_checkpoint:main", "Check every byte of a checkpoint."),
        ("inspect", "tools.inspect_checkpoint:main", "Show the content of a checkpoint."),
        ("compare", "tools.compare_runs:main", "Compare the records of two runs."),
    ),
    "Parts of a run": (
        ("train", "moe_dist.train.__main__:main", "Run one rank of a run, as torchrun starts it."),
        ("trace", "tools.trace:main", "Trace the experts of held-out tokens."),
    ),
}
FIRST = next(iter(COMMANDS))

# Maps each former subcommand to its module in a clone of the repository. An installed package does not contain `research`.
MOVED = {
    "bench": "research.bench",
    "compare-methods": "research.compare_methods",
    "reproduce": "research.experiments",
}


class LazyGroup(TyperGroup):
    """Lists the subcommands, and imports a subcommand's function only when the subcommand runs or a shell completes it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Returns the subcommand's name, its click command and the remaining arguments. For a subcommand in MOVED, the
        error message says which command replaces it."""
        if args[0] in MOVED:
            ctx.fail(f"{args[0]} has moved; in a clone of the repository run `python -m {MOVED[args[0]]}`")
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None or isinstance(command, LazyGroup) else load_subcommand(name), rest


def commands() -> list[tuple[str, str, str]]:
    """Returns all subcommands as entries of COMMANDS: one for each launcher, then the subcommands in COMMANDS."""
    table = _bundled("launchers.table").launcher_table()
    return [*((f"launch {name}", target, line) for name, (target, line) in table.items()), *chain(*COMMANDS.values())]


def _bundled(module: str) -> Any:
    """Imports a module of the packages launchers and tools."""
    add_to_path(source_root())  # the source root contains both packages
    return importlib.import_module(module)


def load_subcommand(name: str) -> Any:
    """Imports a subcommand and returns its click command."""
    words, target = next((words, target) for words, target, _ in commands() if words.split()[-1] == name)
    if words != name:
        function = _bundled("launchers.table").load_launcher(name).main
    else:
        module, _, attribute = target.partition(":")
        function = getattr(_bundled(module), attribute)
    command = typer.main.get_command(command_app(function))
    command.name = name
    return command


def _group(text: str) -> typer.Typer:
    return typer.Typer(
        cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False, help=text, context_settings=HELP_OPTIONS
    )


def make_app() -> typer.Typer:
    """Returns the whole command line, with all subcommands."""
    app = _group("Train mixture-of-experts transformers with expert parallelism.")

    @app.callback()
    def options(  # pyright: ignore[reportUnusedFunction]  # registered by the decorator
        version: Annotated[
            bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        """Train mixture-of-experts transformers with expert parallelism."""

    found = commands()
    launch = _group(f"Start a run: {', '.join(words.split()[-1] for words, _, _ in found if ' ' in words)}.")
    app.add_typer(launch, name="launch", rich_help_panel=FIRST)
    panels = {entry[0]: panel for panel, entries in COMMANDS.items() for entry in entries}
    for words, _, line in found:
        group, _, name = words.rpartition(" ")
        command = (launch if group else app).command(name, help=line, rich_help_panel=panels.get(words))
        command(lambda: None)  # `resolve_command` loads the real function
    return app


def main() -> None:
    """Runs the command line; the installed command `moe-dist` calls this function."""
    make_app()(prog_name="moe-dist")


if __name__ == "__main__":
    main()
