"""Shows the content of a checkpoint: step, layers x groups x experts, bytes, placement, versions. The command loads no
tensor and needs no GPU."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_dist.checkpoint.contents import open_checkpoint, open_shard
from moe_dist.checkpoint.describe import facts, families, placement_lines
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.index import shard_file
from moe_dist.config.yaml_text import dump_yaml
from moe_dist.errors import printable
from moe_dist.runtime.command_line import reports_errors, run_command


@reports_errors("inspect_checkpoint")
def main(
    path: Annotated[Path, typer.Argument(help="A checkpoint (step_N), a folder of checkpoints, or a run: its newest.")],
    config: Annotated[bool, typer.Option("--config", help="Print the run's configuration as YAML.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its shards and fingerprint.")] = False,
) -> None:
    """Print the content of a checkpoint, from its JSON files and the headers of its shards."""
    folder = find_checkpoint(path)
    contents = open_checkpoint(folder)
    if config:
        saved = contents.state.values.get("config")
        print(dump_yaml(saved) if isinstance(saved, dict) else "it was written without a configuration")
        return
    for number in range(contents.index.num_shards):
        open_shard(contents, number)  # raises if a shard file is missing or damaged
    console = Console(width=None if sys.stdout.isatty() else 120)
    about = Table(title=Text(printable(str(folder))), show_header=False)
    for what, how in facts(contents.index, contents.state):
        about.add_row(what, Text(printable(how)))
    for line in placement_lines(contents.state):
        about.add_row("placement", Text(printable(line)))
    console.print(about)
    table = Table("tensors", "", "numbers", "bytes", "")
    for family in families(contents.index):
        name, detail = Text(printable(family.name)), Text(printable(family.detail))
        table.add_row(name, f"{family.tensors:,}", f"{family.numbers:,}", f"{family.nbytes:,}", detail)
    console.print(table)
    if tensors:
        for name, entry in contents.index.tensors.items():
            files = ", ".join(shard_file(chunk.shard) for chunk in entry.chunks)
            print(printable(f"{name}  {entry.dtype} {list(entry.shape)}  {entry.fingerprint}  {files}"))


if __name__ == "__main__":
    run_command(main)
