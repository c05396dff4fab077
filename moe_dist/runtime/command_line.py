"""Runs a command-line program. If it fails, ends it with the error's exit code."""

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, get_type_hints

import typer
from pydantic import ValidationError
from typer.core import TyperCommand

from moe_dist.config.bundled import VERSION
from moe_dist.errors import EXIT_FAILED, MoeDistError

Options = TypeVar("Options")
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
RUN_FOLDER_FIX = "the run folder is <run.root>/<run.name>: repair it, or choose another run.root"


@contextmanager
def reports_errors(name: str = "", *, storage: str = "") -> Iterator[None]:
    """Catches a MoeDistError of the block (or of the decorated function), prints it without traceback, and ends the command
    with the error's exit code.

    Args:
        name: Name of the command, which precedes the message.
        storage: Text that explains how to fix an OSError. If it is empty, an OSError is printed with its traceback.
    """
    try:
        yield
    except MoeDistError as error:
        print(f"{name}: {error}" if name else error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    except BrokenPipeError:  # standard output was closed; typer ends the command with 1
        raise
    except OSError as error:
        if not storage:
            raise
        print(f"{error}; {storage}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED) from error


def print_version(asked: bool) -> None:
    """Prints the version and ends the command if `asked`, which means that --version was given."""
    if asked:
        print(f"moe_dist {VERSION}")
        raise typer.Exit


def print_done(text: str) -> None:
    """Prints a command's result. If the reader of standard output has ended, as in `| head`, the text is lost, but the
    command still succeeds."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # because Python flushes the text again at its exit


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses arguments. If an override begins with dashes or a value is wrong, the error shows the correct form."""
        if dashed := next((each for each in args if re.match(r"--\w+(\.\w+)+(=|$)", each)), None):
            key, _, value = dashed.lstrip("-").partition("=")
            ctx.fail(f"{dashed}: an override of the configuration has no dashes; write {key}={value or 'VALUE'}")
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if isinstance(error.__cause__, ValidationError) and error.param is not None:
                error.message = _value_text(max(error.param.opts, key=len), error.__cause__)
            raise


def _value_text(option: str, error: ValidationError) -> str:
    """Returns an error text with an option's value and the violated rule. If the value is a number with a unit, the text
    suggests the number without the unit."""
    fault, expected = error.errors()[0], "Input should be "
    kind, value, text = fault["type"], fault["input"], fault["msg"]
    if kind not in ("float_parsing", "int_parsing", "int_from_float"):
        return f"{value!r} must be {text.removeprefix(expected)}" if text.startswith(expected) else f"{value!r}: {text}"
    inside = re.search(r"\d+(\.\d+)?" if kind == "float_parsing" else r"\d+", str(value).replace(",", ""))
    number = "number" if kind == "float_parsing" else "whole number"
    return f"{value!r} must be a {number} without unit or currency; write {option} {inside[0] if inside else 2}"


def command_app(main: Callable[..., Any]) -> typer.Typer:
    """Makes a command that shows Python's plain traceback for unexpected errors. Typer's traceback could print local
    variables, such as tokens and keys."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=HELP_OPTIONS)
    app.command(cls=_Command)(main)
    return app


def run_command(main: Callable[..., Any]) -> None:
    """Runs `main` with the command-line arguments. Unexpected errors show Python's plain traceback."""
    command_app(main)()


def takes(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Decorates a function that takes one dataclass. The dataclass's fields become the command's arguments and options."""

    def decorate(main: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(main)
        def command(**values: Any) -> None:
            main(options(**values))

        command.__annotations__ = get_type_hints(options, include_extras=True)  # typer reads types from here
        command.__signature__ = inspect.signature(options)  # pyright: ignore[reportAttributeAccessIssue]  # and defaults here
        return command

    return decorate
