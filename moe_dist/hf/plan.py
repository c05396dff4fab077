"""Plans an import: the source of each logical tensor's values, and the shard, of limited size, that stores them.

A plan depends only on the options and the files' headers. So after a killed import the same command has the same plan.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from moe_dist.checkpoint.storage import Piece
from moe_dist.config.init_rules import identity_choices
from moe_dist.config.model_schema import ModelSection
from moe_dist.errors import ConfigError, DataError
from moe_dist.hf.family import ModelFamily
from moe_dist.hf.fields import Fields
from moe_dist.hf.names import EMBEDDING, HEAD, idle_names, router_name, shards, slots
from moe_dist.hf.sections import GROUP, parsed_section
from moe_dist.hf.source import Source
from moe_dist.model.initial_weights import normal_tensor
from moe_dist.moe.routers.copy_init import uneven_twins

ITEMSIZE = torch.float32.itemsize  # bytes per element, because checkpoints have fp32 weights

_TOGETHER = "take config.json and weights of one model"


@dataclass(frozen=True)
class ImportOptions:
    """The options of an import that change the model or add experts to it."""

    null_experts: int = 0  # number of null experts, whose router rows are copies of the true (not null) experts' rows
    top_k: int | None = None  # number of choices per token if there are null experts
    experts: int = 1  # number of experts per layer that are copies of the dense FFN
    experts_top_k: int = 1  # number of choices per token among the copies of the dense FFN
    seed: int = 0  # seed of the random router rows for the copies of the dense FFN
    modalities: tuple[str, ...] = ("text",)  # modalities of the model's only expert group


@dataclass(frozen=True)
class TensorPart:
    """Some rows of a logical tensor, and the origin (`kind`) of their values. stored: elements of the stored tensor
    `source` from `begin` on. tiled: repeated rows of `source`. normal: random draws, whose seed includes the name. If there
    are `others`, each row is a separate stored tensor: `source` is the first row, `others` are the rest."""

    name: str
    shape: tuple[int, ...]  # shape of the whole logical tensor
    row: int  # index of the part's first row, or of its first element in a vector
    rows: int
    kind: Literal["stored", "tiled", "zeros", "normal"]
    source: str = ""
    begin: int = 0
    std: float = 0.0
    others: tuple[str, ...] = ()
    strides: tuple[int, ...] = ()  # distances of the stored elements along each dim; empty if they are contiguous

    @property
    def box(self) -> tuple[int, ...]:
        return (self.rows, *self.shape[1:])

    @property
    def nbytes(self) -> int:
        return math.prod(self.box) * ITEMSIZE

    def make(self, source: Source, *, seed: int) -> Piece:
        """Reads or draws the part's values. They are fp32, which represents every supported dtype exactly. Raises DataError
        if a value is NaN or infinite."""
        offsets = (self.row, *([0] * (len(self.shape) - 1)))
        values = self._tensor(source, seed).to(torch.float32)
        if not values.isfinite().all():
            raise DataError(
                f"{source.folder}: {self.source}: {int((~values.isfinite()).sum()):,} values of {self.name} are NaN or "
                "infinite, and every weight must be a number; the training that wrote them failed: take earlier weights"
            )
        return Piece(values, offsets, self.shape)

    def _tensor(self, source: Source, seed: int) -> Tensor:
        if self.others:
            return torch.stack([source.read(name, 0, self.shape[1:]) for name in (self.source, *self.others)])
        if self.kind == "stored":
            return source.read(self.source, self.begin, self.box, self.strides)
        if self.kind == "tiled":
            true_rows = source.read(self.source, 0, source.tensors[self.source].shape)
            return true_rows.repeat(self.shape[0] // true_rows.shape[0], 1)
        if self.kind == "zeros":
            return torch.zeros(self.box)
        return normal_tensor(self.name, self.shape, seed=seed, std=self.std)


@dataclass(frozen=True)
class ImportPlan:
    """The model section that an import writes, and the content of its shards."""

    section: ModelSection  # section `model` of the imported model
    shards: Sequence[Sequence[TensorPart]]  # parts of each shard, in the order of the shards
    dtypes: Mapping[str, str]  # dtype of each logical tensor in the Hugging Face folder
    copies: Mapping[str, str]  # maps each stored tensor that is a copy, and not imported, to the tensor that it must equal
    left_out: Sequence[str] = ()  # stored tensors that are not part of the model's function

    @property
    def parts(self) -> list[TensorPart]:
        return [part for shard in self.shards for part in shard]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def changed_section(section: Mapping[str, Any], family: ModelFamily, options: ImportOptions) -> ModelSection:
    """Returns the section `model` of the imported model: the section of config.json, changed by `options`. Raises
    ConfigError, with the reason and the valid values, if an option does not fit the model."""
    if family.layout != "plain":
        return _parsed({**section["moe"], "groups": _unchanged_groups(section, family, options)}, section)
    group, router = dict(section["moe"]["groups"][GROUP]), dict(section["moe"]["router"])
    if options.experts != 1 or options.experts_top_k != 1:
        if family.experts:
            raise ConfigError(f"--experts={options.experts}: {family.name} has experts already; only a dense FFN is copied")
        if options.experts_top_k > options.experts:
            raise ConfigError(f"--experts-top-k={options.experts_top_k} must be at most --experts={options.experts}")
        group |= {"num_experts": options.experts, "top_k": options.experts_top_k}
    if options.null_experts:
        if router["selection_bias"]:
            raise ConfigError(
                f"--null-experts={options.null_experts}: a {family.name} model chooses by scores plus a selection bias, so "
                "that copies of router rows would change its choices; import it without null experts"
            )
        group |= _with_nulls(group, options)
        if router["normalise"] == "none":  # a softmax over all columns would give null columns some weight
            router["normalise"] = "true_all"
    elif options.top_k is not None:
        raise ConfigError(f"--top-k={options.top_k} says how many choices there are with --null-experts; set that as well")
    group["modalities"] = options.modalities
    return _parsed({**section["moe"], "groups": {GROUP: group}, "router": router}, section)


def _parsed(moe: Mapping[str, Any], section: Mapping[str, Any]) -> ModelSection:
    try:
        return parsed_section({**section, "moe": moe})
    except ValidationError as error:
        raise refused("config.json and the options describe an invalid model", error) from error


def _unchanged_groups(section: Mapping[str, Any], family: ModelFamily, options: ImportOptions) -> dict[str, Any]:
    """Returns the groups of a model that is imported unchanged, for example a model with zero-computation experts. Refuses
    options that would add experts."""
    if replace(options, seed=0, modalities=()) != ImportOptions(modalities=()):
        raise ConfigError(
            f"--null-experts={options.null_experts}, --top-k={options.top_k}, --experts={options.experts}: a {family.name} "
            "model takes no further experts and is imported as it is; leave these options out"
        )
    return {
        name: {**group, "modalities": group.get("modalities", options.modalities)}
        for name, group in section["moe"]["groups"].items()
    }


def refused(what: str, error: ValidationError) -> ConfigError:
    """Converts pydantic's errors about options or config.json into a ConfigError. Its message begins with `what`."""
    problems = []
    for each in error.errors(include_url=False):
        where, rule = ".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")
        value = "" if each["type"] == "value_error" else f"={each['input']!r:.80}"
        prefix = f"{where}{value}: " if where else ""
        problems.append(f"{what} (with moe_dist's keys): {prefix}{rule}; change that field, or the option that sets it")
    return ConfigError(problems, see="docs/huggingface.md")


def _with_nulls(group: Mapping[str, Any], options: ImportOptions) -> dict[str, int]:
    num, null, top_k = group["num_experts"], options.null_experts, group["top_k"]
    if problem := uneven_twins(num, null):
        raise ConfigError(f"--null-experts={null}: {problem}")
    allowed = identity_choices(num, null, top_k)
    if options.top_k is None or options.top_k not in allowed:
        raise ConfigError(
            f"--top-k={options.top_k}: with {null} null experts beside {num} true ones, a token takes the same {top_k} "
            f"true experts as before only for {allowed.start} <= top_k <= {allowed.stop - 1}: each true expert's router "
            f"row has {null // num} copies, and ties go to the true expert"
        )
    return {"num_null": null, "top_k": options.top_k}


def make_plan(source: Source, family: ModelFamily, section: ModelSection, *, shard_bytes: int) -> ImportPlan:
    """Makes the plan of an import.

    Args:
        section: The result of `changed_section`.
        shard_bytes: Largest number of bytes in a shard. A tensor that is larger is divided by rows.

    Raises:
        DataError: tensors are missing in the source, have a wrong shape, or have no place in the model. The message names
            all such tensors.
    """
    problems: list[str] = []
    parts: list[TensorPart] = []
    used: set[str] = set()
    dtypes: dict[str, str] = {}
    for slot in slots(section, family):
        there = [place for place in slot.places if place.name in source.tensors]
        place = next((each for each in there if source.tensors[each.name].shape == each.shape), there[0] if there else None)
        if place is None and not slot.places:
            # A dense model has no router. With one expert the router's row has no effect on the output.
            kind = "zeros" if slot.shape[0] == 1 else "normal"
            parts.append(TensorPart(slot.name, slot.shape, 0, slot.shape[0], kind, std=section.init_std))
            continue
        place = place or slot.places[0]
        for each in (place, *slot.next_rows):
            stored = source.tensors.get(each.name)
            if stored is None:
                problems.append(f"{each.name}: is missing; {_TOGETHER}")
                continue
            used.add(each.name)
            dtypes[slot.name] = stored.dtype
            if stored.shape != each.shape:
                problems.append(f"{each.name}: shape {stored.shape}, config.json calls for {each.shape}; {_TOGETHER}")
        others = tuple(each.name for each in slot.next_rows)
        stored = TensorPart(slot.name, slot.shape, 0, slot.shape[0], "stored", place.name, place.begin)
        parts.append(replace(stored, others=others, strides=place.strides))
    if family.layout == "plain":  # in all other layouts the source has router rows for null experts
        parts += _tiled_rows(parts, section)
    copies = {HEAD: EMBEDDING} if section.tie_embeddings and HEAD in source.tensors else {}
    prefixes = tuple(family.multi_token(Fields(source.config, family.name), source.tensors))
    idle = set(idle_names(section, family))
    left_out = sorted(name for name in source.tensors if name not in used and (name.startswith(prefixes) or name in idle))
    used |= {*copies, *left_out}
    problems += [f"{name}: is left over: a {family.name} model of this config.json has no such tensor; {_TOGETHER}"
               for name in source.tensors if name not in used]  # fmt: skip
    if problems:
        raise DataError(sorted(set(problems)), see="docs/huggingface.md")
    pieces = ((piece, piece.nbytes) for part in parts for piece in _cut(part, shard_bytes))
    return ImportPlan(section, list(shards(pieces, shard_bytes)), dtypes, copies, left_out)


def check_copies(source: Source, plan: ImportPlan, *, shard_bytes: int) -> None:
    """Compares the two copies of each tensor that the folder stores twice, in parts of at most `shard_bytes`. Raises
    DataError if the copies differ, because according to config.json the model has only one tensor."""
    for copy, original in plan.copies.items():
        shape, expected = source.tensors[copy].shape, source.tensors[original].shape
        width = math.prod(expected[1:])
        rows = max(1, shard_bytes // (2 * ITEMSIZE * width))
        boxes = [(at * width, (min(rows, expected[0] - at), *expected[1:])) for at in range(0, expected[0], rows)]
        if shape != expected or not all(
            torch.equal(source.read(copy, *box).float(), source.read(original, *box).float()) for box in boxes
        ):
            raise DataError(
                f"{source.folder}: {copy} differs from {original}, but config.json: tie_word_embeddings=true says that "
                "they are the same; set it to false if the model has both"
            )


def _tiled_rows(parts: Sequence[TensorPart], section: ModelSection) -> list[TensorPart]:
    """Returns the router rows of null experts, which are copies of the router rows of the true experts in `parts`."""
    (group,) = section.moe.groups.values()
    names = {router_name(section, layer, "true"): router_name(section, layer, "null") for layer in section.moe_layers}
    gates = [part for part in parts if part.name in names] if group.num_null else []
    if any(gate.kind != "stored" for gate in gates):
        raise ConfigError(
            f"--null-experts={group.num_null}: null experts copy router rows, and a dense model has none; leave it out"
        )
    shape = (group.num_null, section.hidden_dim)
    return [TensorPart(names[gate.name], shape, 0, group.num_null, "tiled", gate.source) for gate in gates]


def _cut(part: TensorPart, shard_bytes: int) -> Iterator[TensorPart]:
    """Divides a part by rows into parts of at most `shard_bytes`."""
    if part.kind != "stored" or part.others or part.nbytes <= shard_bytes:
        yield part
        return
    rows = max(1, shard_bytes // (math.prod(part.shape[1:]) * ITEMSIZE))
    row = part.strides[0] if part.strides else math.prod(part.shape[1:])
    for at in range(0, part.rows, rows):
        count = min(rows, part.rows - at)
        yield replace(part, row=at, rows=count, begin=part.begin + at * row)
