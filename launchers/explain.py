"""Explains and shows configurations: moe-dist explain KEY, moe-dist explain launch.NAME, moe-dist show CONFIG"""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from launchers.table import launcher_table, load_launcher
from moe_dist.config.explain import explain
from moe_dist.config.load import load_config, resolved_yaml
from moe_dist.runtime.command_line import command_app, reports_errors

PLACE = "launch"


def main(
    key: Annotated[
        str, typer.Argument(help="Dotted key or section, as optimizer.lr; launch or launch.NAME. Default: all sections.")
    ] = "",
) -> None:
    """Print type, default and meaning of a key, of all keys of a section, or of the options of a launcher."""
    place, _, name = key.partition(".")
    with reports_errors():
        if place != PLACE:
            Console().print(explain(key))
            return
        if name:
            command = typer.main.get_command(command_app(load_launcher(name).main))
            print(command.get_help(typer.Context(command, info_name=f"moe-dist {PLACE} {name}")))
            return
        table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, show_header=False)
        for each, (_, line) in launcher_table().items():
            table.add_row(f"{PLACE}.{each}", line)
        Console().print(table)


def show(
    config: Annotated[str, typer.Argument(help="Configuration file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides: key=value, as train.steps=200.")] = None,
) -> None:
    """Print the whole configuration, defaults and overrides included."""
    with reports_errors():
        typer.echo(resolved_yaml(load_config(config, overrides or [])), nl=False)
