"""Explains keys of a configuration, and options of launchers: moe-dist explain KEY, moe-dist explain launch.NAME"""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from launchers.table import launcher_table, load_launcher
from moe_dist.config.__main__ import explain
from moe_dist.runtime.command_line import command_app, reports_errors

PLACE = "launch"


def main(
    key: Annotated[
        str, typer.Argument(help="Dotted key or section, as optimizer.lr; launch or launch.NAME. Default: all sections.")
    ] = "",
) -> None:
    """Print type, default and meaning of a key, of all keys of a section, or of the options of a launcher."""
    place, _, name = key.partition(".")
    if place != PLACE:
        explain(key)
        return
    with reports_errors():
        if name:
            command = typer.main.get_command(command_app(load_launcher(name).main))
            print(command.get_help(typer.Context(command, info_name=f"moe-dist {PLACE} {name}")))
            return
        table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, show_header=False)
        for each, (_, line) in launcher_table().items():
            table.add_row(f"{PLACE}.{each}", line)
        Console().print(table)
