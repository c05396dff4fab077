"""Starts a command line program."""

from collections.abc import Callable
from typing import Any

import typer


def command_app(main: Callable[..., Any]) -> typer.Typer:
    """A command with Python's plain traceback: typer's can print local variables, and so write tokens and keys into
    logs."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    return app


def run_command(main: Callable[..., Any]) -> None:
    """As `typer.run`, with the traceback of `command_app`."""
    command_app(main)()
