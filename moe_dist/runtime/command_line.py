"""How a command of ours is started."""

from collections.abc import Callable
from typing import Any

import typer


def command_app(main: Callable[..., Any]) -> typer.Typer:
    """A function as a command, with Python's own traceback: typer's decorated one can print the locals of every frame, and
    what is in them (a token, a key of a service) would stand in the logs."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    return app


def run_command(main: Callable[..., Any]) -> None:
    """As `typer.run`, with the traceback of `command_app`."""
    command_app(main)()
