"""The frozen base model of adapters: a checkpoint of adapters stores the base's path and content hash, not its weights.

Names and shapes decide which tensor of the base is loaded into which tensor of the model. Every parameter of the base must
be used. The FFN of a layer comes from the base's dense FFN in that layer. If the base has no dense FFN there, the FFN comes
from the only expert of the layer's only group, because the import of a dense Hugging Face model makes groups of one expert.
"""

import hashlib
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
from moe_dist.errors import ConfigError, DataError
from moe_dist.placement.roles import EXPERT_NAME, Role, role_of_name

KEY = "base"  # key under which `CheckpointState.values` names the base
GUIDE = "docs/lora-experts.md"

_FFN = re.compile(r"(?P<layer>layers\.\d+)\.(moe\.)?ffn\.(?P<tensor>gate|up|down)\.weight")
_NORM = re.compile(r"(?P<layer>layers\.\d+)\.(moe|ffn)\.norm\.weight")


def content_hash(index: Index) -> str:
    """SHA-256 over name, dtype, shape and fingerprint of every parameter and buffer. The hash does not depend on the layout
    of ranks, the optimizer's moments or the step count."""
    lines = [
        f"{name} {entry.dtype} {list(entry.shape)} {entry.fingerprint}\n"
        for name, entry in sorted(index.tensors.items())
        if not name.startswith(OPTIMIZER_PREFIX)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Base:
    """The base of a checkpoint of adapters."""

    path: str  # folder of the base's checkpoint (step_N)
    content: str  # `content_hash` of the base

    @classmethod
    def noted(cls, values: Mapping[str, JsonValue], folder: Path) -> "Base":
        """The base that the values of a checkpoint name.

        Raises:
            DataError: the values name no base.
        """
        found = values.get(KEY)
        path, content = (found.get("path"), found.get("content")) if isinstance(found, dict) else (None, None)
        if not isinstance(path, str) or not isinstance(content, str):
            raise DataError(f"{folder}: it contains adapters but names no base: state.json has {KEY}={found!r:.80}")
        return cls(path, content)

    def check(self, contents: Contents, adapters: Path) -> None:
        """Checks that `contents` is the base of the adapters.

        Raises:
            DataError: the content hash differs.
        """
        found = content_hash(contents.index)
        if found != self.content:  # the path alone proves nothing, because the folder may hold another model by now
            raise DataError(
                f"{contents.folder}: its content hash is {found}, but the adapters of {adapters} were trained on a base "
                f"with {self.content}; restore that base at {self.path} (or a link to it), or train adapters on this one",
                see=GUIDE,
            )


def find_base(base: Base, adapters: Path) -> Contents:
    """Opens the base of a checkpoint of adapters, and checks its content hash.

    Raises:
        DataError: the base is missing or damaged, or has another content hash.
    """
    try:
        contents = open_checkpoint(find_checkpoint(Path(base.path)))  # reads JSON files only; tensors are read later
    except ConfigError as error:
        raise DataError(
            f"{adapters}: its base {base.path} (content hash {base.content}) is missing; restore it (or a link to it): a "
            "checkpoint of adapters does not contain the base's weights",
            see=GUIDE,
        ) from error
    base.check(contents, adapters)
    return contents


def base_sources(contents: Contents, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Maps each tensor of `specs` to its name in the base.

    Raises:
        ConfigError: the base lacks a tensor, a tensor has another shape or dtype, or the model does not use a parameter.
    """
    index = contents.index
    only = _only_experts(index)
    sources, problems = {}, []
    for name, spec in specs.items():
        source = next((each for each in _candidates(name, only) if each in index.tensors), None)
        if source is None:
            problems.append(f"{name}: the base has no such tensor")
        elif problem := misfit(index.tensors[source], spec, source):
            problems.append(f"{name}: {problem}")
        else:
            sources[name] = source
    used = set(sources.values())
    problems += [
        f"{name}: the model does not use this tensor"
        for name in index.tensors
        # The router and the optimizer of a frozen base are not used.
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
    """Maps each FFN matrix of a base to its name in a layer with LoRA experts, such as `layers.0.moe.ffn.gate`."""
    found = {}
    for name in index.tensors:
        if match := _FFN.fullmatch(name) or EXPERT_NAME.fullmatch(name):
            found[name] = f"{match['layer']}.moe.ffn.{match['tensor']}"
    return found


def _candidates(name: str, only: Mapping[str, str]) -> Iterator[str]:
    """Possible names of a model's tensor in the base, in order of preference. `only` maps each layer with a single expert
    to the name of that expert's group."""
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
    """Maps each layer that has a single group with a single expert to the name of that group."""
    experts: dict[str, set[tuple[str, str]]] = {}
    for name in index.tensors:
        if match := EXPERT_NAME.fullmatch(name):
            experts.setdefault(match["layer"], set()).add((match["group"], match["expert"]))
    return {layer: next(iter(found))[0] for layer, found in experts.items() if len(found) == 1}
