"""Calls the function of a command as the command line does."""

from collections.abc import Callable
from typing import Any

import typer
from click.testing import Result
from typer.testing import CliRunner


def invoke(command: Callable[..., Any], *arguments: object) -> Result:
    """Returns exit code, output and exception of `command` with these arguments."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
