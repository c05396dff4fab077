"""Explains and shows configurations: moe-dist explain KEY, moe-dist explain launch.NAME, moe-dist show CONFIG"""

from itertools import takewhile
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from launchers.table import launcher_table, load_launcher
from moe_dist.config.bundled import source_root
from moe_dist.config.keys import ITEM, NAME, Key, children, find, tag_key, type_text, unknown_key
from moe_dist.config.load import load_config, may_change_on_resume, resolved_yaml
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
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


def configs() -> None:
    """List the configurations of this package with the first sentence of each. Commands take them by name."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, show_header=False)
    for path in sorted((source_root() / "configs").glob("*.yaml")):
        lines = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
        table.add_row(path.stem, " ".join(line.strip("# ") for line in lines).partition(". ")[0].rstrip("."))
    Console().print(table)


def explain(key: str = "") -> RenderableType:
    """Returns the type, default and meaning of a key or, for a section, of each key in it. The empty key explains every
    section. Raises ConfigError if the key does not exist; the message proposes the most similar key."""
    if not key:
        return _section(Key("", Config, None))
    found = find(Config, key)
    if not found:
        raise ConfigError(f"{key}: {unknown_key(Config, key)}")
    resume = "may" if may_change_on_resume(key) else "must not"
    parts: list[RenderableType] = []
    for each in found:
        card = Table.grid(padding=(0, 2))
        card.add_row("key", Text(each.path + (f"  ({each.variant})" if each.variant else ""), style="bold"))
        for label, text in zip(("type", "default", "meaning"), meaning_of(each), strict=True):
            if text:
                card.add_row(label, Text(text))
        parts += [card, ""]
    parts.append(f"This key {resume} change when a run is resumed.")
    return Group(*parts, *([] if not children(found[0].annotation) else ["", _section(found[0])]))


def default_text(key: Key) -> str:
    """Returns a key's default as YAML text, or 'required' if the key has no default."""
    if key.field is None:
        return ""
    if key.field.is_required():
        return "required"
    value = key.field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        tag = tag_key(type(value))
        return f"{tag}: {getattr(value, tag)}" if tag and len(key.sections) > 1 else "all defaults"
    return _plain(value)


def _section(key: Key) -> RenderableType:
    """Returns a table of a section's keys, with a heading for each kind that the section may have."""
    below = children(key.annotation)
    while set(below) in ({NAME}, {ITEM}) and children(inner := below.popitem()[1][0].annotation):
        key, below = Key(f"{key.path}.{NAME}", inner, None), children(inner)
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for column in ("key", "type", "default", "meaning"):
        table.add_column(column, overflow="fold", header_style="bold")
    if "" not in key.sections and key.sections:
        for tag, section in key.sections.items():
            name = tag_key(section)
            table.add_row(Text(f"{name}: {tag}", style="bold"), "", "", Text(_doc(section)))
            _add_rows(table, [each[0] for part, each in children(section).items() if part != name])
    else:
        _add_rows(table, [each for options in below.values() for each in options])
    return table


def _add_rows(table: Table, keys: list[Key]) -> None:
    for key in keys:
        table.add_row(Text(key.path), *(Text(text) for text in meaning_of(key)))


def meaning_of(key: Key) -> tuple[str, str, str]:
    """Returns the type, default and meaning of a key."""
    meaning = key.field.description if key.field and key.field.description else ""
    if not meaning and len(key.sections) == 1:
        meaning = _doc(next(iter(key.sections.values())))
    return type_text(key.annotation, tuple(key.field.metadata) if key.field else ()), default_text(key), meaning


def _doc(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip()


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, BaseModel):
        tag = tag_key(type(value))
        return str(getattr(value, tag)) if tag else "all defaults"
    return str(value)
