"""Calls the function of a command as the command line does."""

from collections.abc import Callable
from typing import Any

import typer
from click.testing import Result
from typer.testing import CliRunner


def invoke(command: Callable[..., Any], *arguments: object, code: int | None = None) -> Result:
    """Returns exit code, output and exception of `command` with these arguments. With `code` asserts the exit code."""
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert code in (None, done.exit_code), done.output
    return done
