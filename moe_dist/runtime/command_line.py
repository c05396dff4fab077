"""Starts a command line program, and ends it with the exit code of an error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from moe_dist.errors import EXIT_FAILED, MoeDistError

RUN_FOLDER_FIX = "the run folder is <run.root>/<run.name>: repair it, or choose another run.root"


@contextmanager
def reports_errors(name: str = "", *, storage: str = "") -> Iterator[None]:
    """Prints an expected error of the block (or of the decorated function) behind the command's name, and ends the command
    with the error's exit code.

    Args:
        storage: How to fix an OSError; without it an OSError keeps its traceback.
    """
    try:
        yield
    except MoeDistError as error:
        print(f"{name}: {error}" if name else error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        if not storage:
            raise
        print(f"{error}; {storage}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED) from error


def command_app(main: Callable[..., Any]) -> typer.Typer:
    """A command with Python's plain traceback: typer's can print local variables, and so write tokens and keys into
    logs."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    return app


def run_command(main: Callable[..., Any]) -> None:
    """As `typer.run`, with the traceback of `command_app`."""
    command_app(main)()
