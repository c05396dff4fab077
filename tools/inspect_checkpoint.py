"""Shows the content of a checkpoint: step, layers x groups x experts, bytes, placement, versions. The command loads no
tensor and needs no GPU."""

import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from pydantic import JsonValue, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_dist.checkpoint.contents import open_checkpoint, open_shard
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.index import ITEMSIZE, Index, StateFile, shard_file
from moe_dist.config.yaml_text import dump_yaml
from moe_dist.errors import ConfigError, printable
from moe_dist.placement.parameter_names import ADAPTERS, ROUTERS, Role, role_of_name
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.runtime.command_line import reports_errors, run_command

_MOMENT = re.compile(r"optimizer\.(?P<moment>\w+?)\.(?P<parameter>.+)")
_EXPERT = re.compile(  # this project's models: moe.experts.GROUP; models of transformers: mlp.experts or mlp.GROUP.experts
    r"(?P<layer>layers\.\d+)\.(?=.*\bexperts\.)\w+\.(experts\.)?(?P<group>\w+?)(\.experts)?\.(?P<expert>\d+)\.(?P<tensor>\w+)"
)


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
    for what, how in _facts(contents.index, contents.state):
        about.add_row(what, Text(printable(how)))
    for line in _placement_lines(contents.state):
        about.add_row("placement", Text(printable(line)))
    console.print(about)
    table = Table("tensors", "", "numbers", "bytes", "")
    for cells in _families(contents.index):
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console.print(table)
    if tensors:
        for name, entry in contents.index.tensors.items():
            files = ", ".join(shard_file(chunk.shard) for chunk in entry.chunks)
            print(printable(f"{name}  {entry.dtype} {list(entry.shape)}  {entry.fingerprint}  {files}"))


def _families(index: Index) -> Iterator[tuple[str, ...]]:
    """Yields a row for each kind of tensor: the kind, the number of tensors, the number of values, the bytes and, for
    experts, the numbers of layers and of experts. The kinds of parameters are `dense`, `routers`, `adapters` and `experts
    of GROUP`. The kinds of the optimizer's moments, such as `exp_avg of dense`, come after the parameters."""
    members: dict[str, list[str]] = defaultdict(list)
    for name in index.tensors:
        moment = _MOMENT.fullmatch(name)
        kind = _kind(moment["parameter"] if moment else name)
        members[f"{moment['moment']} of {kind}" if moment else kind].append(name)
    for kind in sorted(members, key=lambda kind: (" of " in kind.replace("experts of ", ""), kind)):
        entries = [index.tensors[name] for name in members[kind]]
        numbers = sum(math.prod(entry.shape) for entry in entries)
        nbytes = sum(math.prod(entry.shape) * ITEMSIZE[entry.dtype] for entry in entries)
        found = [match for name in members[kind] if (match := _EXPERT.search(name))]
        detail = ""
        if found:
            layers, experts = {m["layer"] for m in found}, {m["expert"] for m in found}
            detail = f"{len(layers)} layers x {len(experts)} experts x {', '.join(sorted({m['tensor'] for m in found}))}"
        yield kind, f"{len(entries):,}", f"{numbers:,}", f"{nbytes:,}", detail


def _facts(index: Index, state: StateFile) -> list[tuple[str, str]]:
    """Returns step, run, progress, layout of ranks and package versions of a checkpoint, as pairs (name, text)."""
    config = _mapping(state.values.get("config"))
    run, parallel, placement = (_mapping(config.get(name)) for name in ("run", "parallel", "placement"))
    base = _mapping(state.values.get("base"))  # only a checkpoint of adapters names a base model
    taken = f", {state.optimizer_steps} of them by the optimizer" if state.optimizer_steps else ""
    counters = _mapping(state.values.get("progress")).items()
    counted = [f"{name} {value:,}" for name, value in counters if isinstance(value, int)]
    sizes = [shard.size for shard in index.shards]
    layout = f": ep {parallel.get('ep')} x edp {parallel.get('edp')}, {parallel.get('data')}, {placement.get('policy')}"
    return [
        ("step", f"{index.step}{taken}"),
        ("run", str(run.get("name", "?")) if run else "unknown"),
        ("save", index.save_id),
        ("progress", ", ".join(counted) or "none"),
        ("written by", f"{state.world_size} ranks{layout if parallel and placement else ''}"),
        ("shards", f"{index.num_shards} of {min(sizes):,} to {max(sizes):,} bytes"),
        *([("base", f"{base.get('path')}, content hash {base.get('content')}")] if base else []),
        ("versions", ", ".join(f"{name} {version}" for name, version in state.versions.items())),
        ("also saved", ", ".join(sorted(state.values)) or "nothing"),
    ]


def _placement_lines(state: StateFile) -> list[str]:
    """Returns one line per EP rank, which lists the rank's experts."""
    try:
        groups = TypeAdapter(tuple[ExpertGroup, ...]).validate_python(state.placement.get("groups"))
        slots = TypeAdapter(tuple[tuple[int, ...], ...]).validate_python(state.placement.get("slots"))
        placement = ExpertPlacement(groups, slots)
    except (ValidationError, ConfigError):
        return ["unknown"]
    held = (" ".join(map(placement.name_of, experts)) for experts in placement.slots)
    return [f"EP rank {rank}: {names or 'no expert'}" for rank, names in enumerate(held)]


def _kind(name: str) -> str:
    role = role_of_name(name)
    if role is Role.EXPERT and (match := _EXPERT.search(name)):
        return f"experts of {match['group']}"
    return "routers" if role in ROUTERS else "adapters" if role in ADAPTERS else "dense"


def _mapping(value: JsonValue) -> dict[str, JsonValue]:
    return value if isinstance(value, dict) else {}


if __name__ == "__main__":
    run_command(main)
