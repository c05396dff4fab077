"""Starts a command line program."""

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, get_type_hints

import typer

from moe_dist.errors import MoeDistError

P = ParamSpec("P")
Options = TypeVar("Options")


def command_app(main: Callable[..., Any]) -> typer.Typer:
    """A command with Python's plain traceback: typer's can print local variables, and so write tokens and keys into
    logs."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    return app


def run_command(main: Callable[..., Any]) -> None:
    """As `typer.run`, with the traceback of `command_app`."""
    command_app(main)()


def reports_errors(name: str = "") -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Makes a command print an expected error behind the command's name, and end with the error's exit code."""

    def decorate(main: Callable[P, None]) -> Callable[P, None]:
        @wraps(main)
        def command(*arguments: P.args, **options: P.kwargs) -> None:
            try:
                main(*arguments, **options)
            except MoeDistError as error:
                print(f"{name}: {error}" if name else error, file=sys.stderr)
                raise typer.Exit(error.exit_code) from error

        return command

    return decorate


def takes(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Makes a command whose arguments and options are the fields of a dataclass."""

    def decorate(main: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(main)
        def command(**values: Any) -> None:
            main(options(**values))

        command.__annotations__ = get_type_hints(options, include_extras=True)
        command.__signature__ = inspect.signature(options)  # pyright: ignore[reportAttributeAccessIssue]
        return command

    return decorate
