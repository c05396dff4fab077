"""Finds the frozen base model of LoRA adapters. A checkpoint of adapters has the base's path and hash, but not its weights.

Tensors of the base's checkpoint are matched with tensors of the model by name and shape. The model must use
every parameter of the base except the routers. A layer's FFN is loaded from the base's dense FFN in that layer. If the base
has no dense FFN there, the layer's FFN is loaded from the base's only expert in that layer; an imported dense Hugging Face
model has one expert per layer.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from moe_dist.checkpoint.contents import Contents, open_checkpoint
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.fits import misfit
from moe_dist.checkpoint.index import Index, listed
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, TensorSpec
from moe_dist.checkpoint.upcycle import experts_by_layer
from moe_dist.errors import ConfigError, DataError
from moe_dist.placement.parameter_names import EXPERT_NAME, Role, role_of_name

KEY = "base"  # key of the base's path and content hash in `CheckpointState.values`
GUIDE = "docs/lora-experts.md"

_FFN = re.compile(r"(?P<layer>layers\.\d+)\.(moe\.)?ffn\.(?P<tensor>gate|up|down)\.weight")
_NORM = re.compile(r"(?P<layer>layers\.\d+)\.(moe|ffn)\.norm\.weight")


def content_hash(index: Index) -> str:
    """Returns a SHA-256 hash over the name, dtype, shape and fingerprint of every parameter and buffer in a checkpoint. The
    hash does not depend on the layout of ranks, the optimizer's moments or the step count."""
    lines = [
        f"{name} {entry.dtype} {list(entry.shape)} {entry.fingerprint}\n"
        for name, entry in sorted(index.tensors.items())
        if not name.startswith(OPTIMIZER_PREFIX)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Base:
    """Identifies the base model of a checkpoint of adapters by folder and content hash."""

    path: str  # folder of the base's checkpoint (step_N)
    content: str  # `content_hash` of that checkpoint
    beside: str = ""  # `path` relative to the folder of the adapters' checkpoints; older versions saved ""

    @classmethod
    def of(cls, contents: Contents, checkpoints: Path) -> "Base":
        """Returns the `Base` of an opened base checkpoint. The adapters' checkpoints are in the folder `checkpoints`."""
        path = contents.folder.absolute()
        return cls(str(path), content_hash(contents.index), os.path.relpath(path, checkpoints.absolute()))

    @classmethod
    def noted(cls, values: Mapping[str, JsonValue], folder: Path) -> "Base":
        """Reads the base's path and content hash from the JSON values of the adapters' checkpoint in `folder`. Raises
        DataError if one of the two is missing."""
        found = values.get(KEY)
        path, content = (found.get("path"), found.get("content")) if isinstance(found, dict) else (None, None)
        if not isinstance(path, str) or not isinstance(content, str):
            raise DataError(f"{folder}: it contains adapters but names no base: state.json has {KEY}={found!r:.80}")
        beside = found.get("beside", "") if isinstance(found, dict) else ""
        return cls(path, content, beside if isinstance(beside, str) else "")

    def places(self, adapters: Path) -> list[Path]:
        """Returns the folders where the base may be. The first folder is `path`. The second folder is found by `beside`,
        which stays valid if base and adapters are moved together. If `path` is relative, the remaining folders are `path`
        below each folder that contains the adapters."""
        folder = adapters.absolute()
        places = [Path(self.path)]
        if self.beside:
            places.append(Path(os.path.normpath(folder.parent / self.beside)))
        if not places[0].is_absolute():
            places += [parent / self.path for parent in folder.parents]
        return list(dict.fromkeys(places))

    def check(self, contents: Contents, adapters: Path) -> None:
        """Checks that `contents` is the base on which the adapters in the folder `adapters` were trained. Raises DataError
        if the content hash of `contents` is not `content`."""
        found = content_hash(contents.index)
        if found != self.content:  # another model may have been saved at `path` since
            raise DataError(
                f"{contents.folder}: its content hash is {found}, but the adapters of {adapters} were trained on a base "
                f"with {self.content}; restore that base at {self.path} (or a link to it), or train adapters on this one",
                see=GUIDE,
            )


def find_base(base: Base, adapters: Path) -> Contents:
    """Opens the base's checkpoint for the adapters in the folder `adapters`. Opens the first of `Base.places` whose
    checkpoint has the base's content hash. Raises DataError if there is none, or if one is damaged."""
    others = []
    for place in base.places(adapters):
        try:
            contents = open_checkpoint(find_checkpoint(place))  # reads JSON files only; tensors are read later
        except ConfigError:
            continue
        if content_hash(contents.index) == base.content:
            return contents
        others.append(contents)
    if others:
        base.check(others[0], adapters)
    path, *more = base.places(adapters)
    also = f", nor at {', '.join(map(str, more))}" if more else ""
    raise DataError(
        f"{adapters}: its base {path} (content hash {base.content}) is missing{also}; restore it (or a link to it): a "
        "checkpoint of adapters does not contain the base's weights",
        see=GUIDE,
    )


def base_sources(contents: Contents, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Maps the name of each model tensor in `specs` to the name of the base's tensor that is loaded into it. Raises
    ConfigError if the base lacks such a tensor, its shape or dtype differs, or the model does not use a parameter of the
    base."""
    index = contents.index
    only = _only_experts(index)
    sources, problems = {}, []
    for name, spec in specs.items():
        source = next((each for each in _candidates(name, only) if each in index.tensors), None)
        if source is None:
            problems.append(f"{name}: the base has no such tensor")
        elif misfit(entry := index.tensors[source], spec):
            problems.append(f"{name}: {spec.dtype} {spec.shape} in the model, {entry.dtype} {entry.shape} in {source}")
        else:
            sources[name] = source
    used = set(sources.values())
    problems += [
        f"{name}: the model does not use this tensor"
        for name in index.tensors
        # The model does not use the base's routers and optimizer moments.
        if name not in used and not name.startswith(OPTIMIZER_PREFIX) and role_of_name(name) is not Role.ROUTER
    ]
    if problems:
        head = (
            f"run.init_rules: adapt cannot use {contents.folder} as base; give the model the widths and layers of the "
            "base, which must have one dense FFN (or one expert) in each layer with LoRA experts"
        )
        raise ConfigError(listed(head, problems), see=GUIDE)
    return sources


def base_names(index: Index) -> dict[str, str]:
    """Maps the names of a base's FFN matrices to names in a model with LoRA experts, such as `layers.0.moe.ffn.gate`."""
    found = {}
    for name in index.tensors:
        if match := _FFN.fullmatch(name) or EXPERT_NAME.fullmatch(name):
            found[name] = f"{match['layer']}.moe.ffn.{match['tensor']}"
    return found


def _candidates(name: str, only: Mapping[str, str]) -> Iterator[str]:
    """Yields the names that the model's tensor `name` may have in the base's checkpoint, in order of preference. `only` is
    the result of `_only_experts`."""
    yield name
    if match := _NORM.fullmatch(name):
        yield f"{match['layer']}.ffn.norm.weight"
        yield f"{match['layer']}.moe.norm.weight"
    elif match := _FFN.fullmatch(name):
        layer, tensor = match["layer"], match["tensor"]
        yield f"{layer}.ffn.{tensor}.weight"
        if layer in only:
            yield f"{layer}.moe.experts.{only[layer]}.0.{tensor}"


def _only_experts(index: Index) -> dict[str, str]:
    """Maps the name of each layer with exactly one expert to the name of that expert's group."""
    found = experts_by_layer(index.tensors)
    return {layer: next(iter(groups)) for layer, groups in found.items() if sum(map(len, groups.values())) == 1}
