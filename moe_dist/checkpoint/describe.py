"""Summarises a checkpoint from its JSON files and shard headers. Does not import torch."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from moe_dist.checkpoint.index import ITEMSIZE, Entry, Index, StateFile
from moe_dist.placement.parameter_names import ADAPTERS, EXPERT_NAME, ROUTERS, role_of_name

_MOMENT = re.compile(r"optimizer\.(?P<moment>\w+?)\.(?P<parameter>.+)")


@dataclass(frozen=True)
class Family:
    """Number and size of a checkpoint's tensors of one family, such as the routers."""

    name: str  # `dense`, `routers`, `adapters` or `experts of GROUP`; `MOMENT of` such a name for moments
    tensors: int
    numbers: int  # total elements of these tensors
    nbytes: int
    detail: str  # for experts a text such as `4 layers x 8 experts x down, gate, up`; otherwise empty


def families(index: Index) -> list[Family]:
    """Returns number and size of a checkpoint's tensors by family: first families of parameters, then of moments."""
    members: dict[str, list[str]] = defaultdict(list)
    for name in index.tensors:
        moment = _MOMENT.fullmatch(name)
        kind = _kind(moment["parameter"] if moment else name)
        members[f"{moment['moment']} of {kind}" if moment else kind].append(name)
    order = sorted(members, key=lambda kind: (" of " in kind.replace("experts of ", ""), kind))
    return [_family(kind, {name: index.tensors[name] for name in members[kind]}) for kind in order]


def facts(index: Index, state: StateFile) -> list[tuple[str, str]]:
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


def placement_lines(state: StateFile) -> list[str]:
    """Returns one line per EP rank, which lists the rank's experts."""
    groups, slots = state.placement.get("groups"), state.placement.get("slots")
    if not isinstance(groups, list) or not isinstance(slots, list):
        return ["unknown"]
    lines = []
    for rank, experts in enumerate(slots):
        held = [_expert_name(groups, expert) for expert in experts] if isinstance(experts, list) else []
        lines.append(f"EP rank {rank}: {' '.join(held) or 'no expert'}")
    return lines


def _kind(name: str) -> str:
    role = role_of_name(name)
    if role not in ADAPTERS and (match := EXPERT_NAME.fullmatch(name)):
        return f"experts of {match['group']}"
    return "routers" if role in ROUTERS else "adapters" if role in ADAPTERS else "dense"


def _family(kind: str, entries: Mapping[str, Entry]) -> Family:
    numbers = sum(math.prod(entry.shape) for entry in entries.values())
    nbytes = sum(math.prod(entry.shape) * ITEMSIZE[entry.dtype] for entry in entries.values())
    found = [match for name in entries if (match := EXPERT_NAME.search(name))]
    detail = ""
    if found:
        layers, experts = {m["layer"] for m in found}, {m["expert"] for m in found}
        detail = f"{len(layers)} layers x {len(experts)} experts x {', '.join(sorted({m['tensor'] for m in found}))}"
    return Family(kind, len(entries), numbers, nbytes, detail)


def _mapping(value: JsonValue) -> dict[str, JsonValue]:
    return value if isinstance(value, dict) else {}


def _expert_name(groups: list[JsonValue], expert: JsonValue) -> str:
    for group in groups:
        if isinstance(group, dict) and isinstance(expert, int):
            first, count = group.get("first_expert"), group.get("num_experts")
            if isinstance(first, int) and isinstance(count, int) and first <= expert < first + count:
                return f"{group.get('name')}/{expert - first}"
    return f"?{expert}"
