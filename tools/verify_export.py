"""Checks that loading an exported folder with trust_remote_code runs only moe_dist's code. See docs/huggingface.md."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.errors import DataError
from moe_dist.runtime.command_line import print_done, reports_errors, run_command


@reports_errors("verify_export")
def main(folder: Annotated[Path, typer.Argument(help="A folder that export-hf wrote.")]) -> None:
    """Compare the code files of an export with the files of this moe_dist, and find all other ways to run code."""
    from moe_dist.hf.code_checks import verify_export

    if problems := verify_export(folder):
        raise DataError([f"{folder}: {problem}" for problem in problems], see="docs/huggingface.md")
    print_done(f"{folder} brings no code but that of this moe_dist")


if __name__ == "__main__":
    run_command(main)
