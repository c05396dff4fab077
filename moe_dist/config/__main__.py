"""The commands `python -m moe_dist.config explain KEY` and `python -m moe_dist.config show CONFIG [key=value ...]`."""

from typing import Annotated

import typer
from rich.console import Console

from moe_dist.config.explain import explain as explain_key
from moe_dist.config.load import load_config, resolved_yaml
from moe_dist.errors import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="Dotted key or section, as optimizer.lr. Default: all sections.")] = "",
) -> None:
    """Print type, default and meaning of a key, or of all keys of a section."""
    try:
        Console().print(explain_key(key))
    except ConfigError as error:
        _end(error)


@app.command()
def show(
    config: Annotated[str, typer.Argument(help="Configuration file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides: key=value, as train.steps=200.")] = None,
) -> None:
    """Print the whole configuration, defaults and overrides included."""
    try:
        typer.echo(resolved_yaml(load_config(config, overrides or [])), nl=False)
    except ConfigError as error:
        _end(error)


def _end(error: ConfigError) -> None:
    typer.echo(str(error), err=True)
    raise typer.Exit(error.exit_code)


if __name__ == "__main__":
    app()
