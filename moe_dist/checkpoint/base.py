"""The frozen model under adapters: a checkpoint of adapters holds its place and its content hash, and never its weights.

Names and shapes decide what of the base stands where; a base that is not taken whole is refused. A layer's frozen FFN is
the first of these that the base has: the layer's dense FFN, or the only expert of its only group (which is how a dense
model of Hugging Face is stored). A layer that is dense here may be either there as well.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import JsonValue

from moe_dist.checkpoint.content_hash import content_hash
from moe_dist.checkpoint.contents import Contents, open_checkpoint
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.fits import DTYPES
from moe_dist.checkpoint.index import Index, listed
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, TensorSpec
from moe_dist.errors import ConfigError, DataError
from moe_dist.placement.roles import EXPERT_NAME, Role, role_of_name

KEY = "base"  # in the values of a checkpoint
GUIDE = "docs/lora-experts.md"

_FFN = re.compile(r"(?P<layer>layers\.\d+)\.(moe\.)?ffn\.(?P<tensor>gate|up|down)\.weight")
_NORM = re.compile(r"(?P<layer>layers\.\d+)\.(moe|ffn)\.norm\.weight")


@dataclass(frozen=True)
class Base:
    """The base of a checkpoint of adapters.

    Attributes:
        path: Its folder (`step_N`), as it was found.
        content: `content_hash` of it.
    """

    path: str
    content: str

    def to_json(self) -> dict[str, JsonValue]:
        return {**asdict(self)}

    @classmethod
    def noted(cls, values: Mapping[str, JsonValue], folder: Path) -> "Base":
        """What a checkpoint's values say.

        Raises:
            DataError: they name no base.
        """
        found = values.get(KEY)
        path, content = (found.get("path"), found.get("content")) if isinstance(found, dict) else (None, None)
        if not isinstance(path, str) or not isinstance(content, str):
            raise DataError(f"{folder}: it holds adapters and names no base: state.json has {KEY}={found!r:.80}")
        return cls(path, content)

    def check(self, contents: Contents, adapters: Path) -> None:
        """Refuses another base than that of the adapters.

        Raises:
            DataError: with both hashes.
        """
        found = content_hash(contents.index)
        if found != self.content:
            raise DataError(
                f"{contents.folder}: its content hash is {found}, and the adapters of {adapters} were trained on a base "
                f"with {self.content}; put that base back at {self.path} (a link will do), or train adapters on this one",
                see=GUIDE,
            )


def find_base(base: Base, adapters: Path) -> Contents:
    """The base of a checkpoint of adapters, found to be the one.

    Raises:
        DataError: it is not there, damaged, or another one.
    """
    try:
        contents = open_checkpoint(find_checkpoint(Path(base.path)))
    except ConfigError as error:
        raise DataError(
            f"{adapters}: its base {base.path} (content hash {base.content}) is not there; put it back (a link will do): a "
            "checkpoint of adapters holds no weight of it",
            see=GUIDE,
        ) from error
    base.check(contents, adapters)
    return contents


def base_sources(contents: Contents, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """For each tensor of `specs` (the frozen ones, and what else the base gives) its name in the base.

    Raises:
        ConfigError: the base lacks one, has it in another shape, or has a parameter that finds no place.
    """
    index = contents.index
    only = _only_experts(index)
    sources, problems = {}, []
    for name, spec in specs.items():
        source = next((each for each in _candidates(name, only) if each in index.tensors), None)
        if source is None:
            problems.append(f"{name}: the base has none")
        elif (entry := index.tensors[source]).shape != spec.shape or DTYPES.get(entry.dtype) != spec.dtype:
            problems.append(f"{name}: {spec.dtype} {spec.shape} in the model, {entry.dtype} {entry.shape} in {source}")
        else:
            sources[name] = source
    used = set(sources.values())
    problems += [
        f"{name}: the model has no place for it"
        for name in index.tensors
        if name not in used and not name.startswith(OPTIMIZER_PREFIX) and role_of_name(name) is not Role.ROUTER
    ]
    if problems:
        head = (
            f"run.init_rules: adapt cannot stand on {contents.folder}; give the model the widths and layers of the base, "
            "which has one dense FFN (or one expert) a layer under LoRA experts"
        )
        raise ConfigError(listed(head, problems), see=GUIDE)
    return sources


def base_names(index: Index) -> dict[str, str]:
    """For each FFN matrix of a base its layer's name for it under LoRA experts, `layers.i.moe.ffn.gate`."""
    found = {}
    for name in index.tensors:
        if match := _FFN.fullmatch(name) or EXPERT_NAME.fullmatch(name):
            found[name] = f"{match['layer']}.moe.ffn.{match['tensor']}"
    return found


def _candidates(name: str, only: Mapping[str, str]) -> Iterator[str]:
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
    """For each layer with a single expert in a single group, the group."""
    experts: dict[str, set[tuple[str, str]]] = {}
    for name in index.tensors:
        if match := EXPERT_NAME.fullmatch(name):
            experts.setdefault(match["layer"], set()).add((match["group"], match["expert"]))
    return {layer: next(iter(found))[0] for layer, found in experts.items() if len(found) == 1}
