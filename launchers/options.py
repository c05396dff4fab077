"""Arguments and options that launchers share."""

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(help="Configuration of the run, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, as train.steps=200; later ones win.")]
ClusterName = Annotated[
    str | None, typer.Option(help="Cluster file, or its name in configs/clusters; default $MOE_DIST_CLUSTER.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Rename an old run of this name first.")]
