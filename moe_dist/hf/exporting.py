"""Exports a checkpoint as a Hugging Face folder for transformers. Each matrix of each expert becomes a separate tensor.

`moe_dist.hf.forms` chooses the form: a plain family of transformers, or a form that brings its own modelling code.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from moe_dist.checkpoint.base import KEY as BASE
from moe_dist.checkpoint.base import Base, find_base
from moe_dist.checkpoint.contents import Contents, open_checkpoint
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX
from moe_dist.checkpoint.storage import new_folder, write_durably, write_tensors
from moe_dist.checkpoint.whole_tensors import Read, merged_reader, tensor_reader
from moe_dist.config.model_schema import ModelSection
from moe_dist.config.partial import read_stored
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError, DataError, MoeDistError
from moe_dist.hf.code_checks import refuse_code
from moe_dist.hf.data_files import README, TOKENIZER_FILE, DataFiles, find_data, readme
from moe_dist.hf.families import FAMILIES
from moe_dist.hf.family import ModelFamily
from moe_dist.hf.fields import INERT
from moe_dist.hf.forms import choose_form, read_config
from moe_dist.hf.importing import HUGGINGFACE, imported_values
from moe_dist.hf.names import Slot, TensorPlace, router_name, shards, slots
from moe_dist.hf.sections import meaning, parsed_section, write_fields
from moe_dist.hf.served_fields import CODE, CODE_FILES, SERVED, token_ids, write_served
from moe_dist.hf.source import COMPANIONS, CONFIG_FILE, DTYPES, INDEX_FILE, WEIGHTS_FILE, companion, read_configuration
from moe_dist.runtime.progress import Report

SHARD_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    family: str  # `model_type`
    tensors: int
    shards: int
    folded: int  # number of null experts per layer that were left out
    like: Path | None  # folder from which tokenizer files and config.json fields were copied
    merged: bool = False  # True if LoRA adapters were merged into their base
    reasons: Sequence[str] = ()  # why no plain family fits; empty if a plain family was written or the user chose the form


def export_model(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    family: str | None = None,
    like: Path | None = None,
    data: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: Report = lambda stage, done, total: None,
) -> Exported:
    """Exports a checkpoint as the new folder `out`. Needs memory for one shard, plus one tensor in fp32.

    Args:
        checkpoint: Folder of a checkpoint, or of a run or an import with a checkpoint.
        dtype: Dtype of all tensors, a key of `source.DTYPES`. If None, each tensor gets the dtype that it had before the
            import, or else its dtype in the checkpoint.
        family: `model_type` to write. If None, the family before the import. If there was no import, the first plain family
            that fits the model. If none fits, `moe_dist`, with its modelling code beside the weights.
        like: Folder whose config.json and tokenizer files are used. If None, the folder `huggingface` of the import that
            contains the checkpoint, or of `run.init_from`, is used if it exists.
        data: Folder of the run's data set, which knows each modality's token ids. It is needed for several expert groups.
            If None, the run's `data.path` is used.

    Raises:
        ConfigError: `out` exists, no form fits the model, or the data set is missing. The message gives the reasons.
        DataError: the checkpoint is damaged or incomplete, or has weights that are not finite or too large for `dtype`.
        CheckpointError: `out` cannot be written.
    """
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists; nothing is overwritten: remove it, or choose another folder")
    contents = open_checkpoint(find_checkpoint(checkpoint))
    if merged := BASE in contents.state.values:
        adapters = contents
        contents = find_base(Base.noted(adapters.state.values, adapters.folder), adapters.folder)
        read = merged_reader(contents, adapters, checked_config(adapters).model)
    else:
        read = tensor_reader(contents)
    config = checked_config(contents)
    noted, dtypes = imported_values(contents.state.values)
    dtypes = {} if merged else dtypes  # a merged matrix needs more bits than the imported base matrix
    form = choose_form(config.model, read, family or noted, must=family is not None)
    found = _account(contents, config.model, form.section, form.family)
    beside = [contents.folder.absolute().parent, *([Path(config.run.init_from)] if config.run.init_from else [])]
    like = like or next((each / HUGGINGFACE for each in beside if (each / HUGGINGFACE / CONFIG_FILE).is_file()), None)
    if like is not None:
        refuse_code(like)
    wanted = {slot.name: dtype or dtypes.get(slot.name) or contents.index.tensors[slot.name].dtype for slot in found}
    if odd := [f"{name} is {each}" for name, each in wanted.items() if each not in DTYPES]:
        raise ConfigError(f"{odd[0]}; say --dtype {', '.join(DTYPES)}")
    about = _data(contents, config, data)
    said = _said_fields(form.family, form.section, like, about)
    fields = _fields(form.section, form.family, said, like, list(wanted.values()))
    stored = _stored_tensors(found, wanted)
    with new_folder(out) as folder:
        num_shards = _write(folder, read, stored, shard_bytes, report)
        write_durably(folder / CONFIG_FILE, (json.dumps(fields, indent=2) + "\n").encode())
        files = about.tokenizer_files() if isinstance(about, DataFiles) and like is None else {}
        files |= {name: companion(like, name).read_bytes() for name in COMPANIONS if like and (like / name).is_file()}
        files |= {name: (CODE / name).read_bytes() for name in CODE_FILES if form.family is SERVED}
        files[README] = readme(
            form.family.name,
            brings_code=form.family is SERVED,
            tokenizer=TOKENIZER_FILE in files,
            in_transformers=form.family is SERVED or form.family.name in FAMILIES,
        )
        for name, content in files.items():
            write_durably(folder / name, content)
    nulls = [sum(group.num_null for group in model.moe.groups.values()) for model in (config.model, form.section)]
    return Exported(form.family.name, len(stored), num_shards, nulls[0] - nulls[1], like, merged, form.reasons)


def checked_config(contents: Contents) -> Config:
    """Returns the configuration of a checkpoint. Raises DataError if this version of moe_dist cannot read it."""
    try:
        return read_stored(Config, contents.state.values.get("config"))
    except ConfigError as error:
        said = "; ".join(error.problems)
        raise DataError(
            f"{contents.folder}: its state.json has no configuration that this version can read: {said}"
        ) from error


def _account(contents: Contents, model: ModelSection, section: ModelSection, family: ModelFamily) -> list[Slot]:
    """Returns the tensors to write, and checks that they include all parameters of the checkpoint that have an effect.
    Raises DataError if the checkpoint lacks a tensor, or has a tensor with a wrong shape or one that the family lacks.
    """
    needed = slots(section, family)
    there = {name for name in contents.index.tensors if not name.startswith(OPTIMIZER_PREFIX)}
    plain = family.layout == "plain"
    nulls = {router_name(model, layer, "null") for layer in model.moe_layers} if plain else set()
    problems = [f"{slot.name}: is missing" for slot in needed if slot.name not in there]
    without_place = there - nulls - {slot.name for slot in needed}
    problems += [f"{name}: is left over: {family.name} has no place for it" for name in without_place]
    problems += [
        f"{slot.name}: shape {contents.index.tensors[slot.name].shape}, its configuration calls for {slot.shape}"
        for slot in needed
        if slot.name in there and contents.index.tensors[slot.name].shape != slot.shape
    ]
    if problems:
        raise DataError([f"{contents.folder}: {problem}" for problem in sorted(problems)])
    return [slot for slot in needed if slot.places]


def _data(contents: Contents, config: Config, asked: Path | None) -> DataFiles | MoeDistError:
    """Returns the run's data set. If it is missing, returns the error, or raises it if the user `asked` for a folder."""
    try:
        return find_data(contents.state.values, config.data.path, asked)
    except (ConfigError, DataError) as error:
        if asked is not None:
            raise
        return error


def _said_fields(
    family: ModelFamily, section: ModelSection, like: Path | None, data: DataFiles | MoeDistError
) -> dict[str, Any]:
    """Returns the fields of config.json that follow from the model. Raises ConfigError if the model has several groups, but
    neither `like` nor the data set knows their token ids."""
    marks = data.marks if isinstance(data, DataFiles) and like is None else {}
    if family is not SERVED:
        return {**write_fields(section, family), **marks}
    groups = section.moe.groups
    if isinstance(data, DataFiles):
        ids = token_ids(section, data.manifest)
    else:
        base = read_configuration(like, CONFIG_FILE) if like else {}
        said = base.get("expert_groups") if base.get("model_type") == SERVED.name else None
        ids = {group.get("name"): group.get("token_ids") for group in said or ()}
        if len(groups) > 1 and not all(ids.get(name) for name in groups):
            problem = f"model.moe.groups: {', '.join(groups)}: the data set has the ids of each group's tokens"
            raise ConfigError([problem, *data.problems], see="docs/huggingface.md")
    return {**write_served(section, ids), **marks}


def _fields(
    section: ModelSection, family: ModelFamily, said: Mapping[str, Any], like: Path | None, dtypes: Sequence[str]
) -> dict[str, Any]:
    """Returns the fields of config.json. These are the fields of `like` if they describe the model. Otherwise they are the
    fields that follow from the section `model`, plus all other fields of `like`."""
    base = read_configuration(like, CONFIG_FILE) if like else {}
    inert = {name: value for name, value in base.items() if name in INERT}
    dtype = str(DTYPES[max(DTYPES, key=dtypes.count)]).removeprefix("torch.")
    of_family = base if base.get("model_type") == family.name else inert
    for fields in (base, {**of_family, **said}, {**inert, **said}):
        # A group's token ids are not part of the section `model`.
        if _says(fields, section, family) and fields.get("expert_groups") == said.get("expert_groups"):
            keys = [key for key in ("dtype", "torch_dtype") if key in fields] or ["torch_dtype", "dtype"]
            return {**fields, **dict.fromkeys(keys, dtype)}
    raise AssertionError(f"config.json of {family.name} does not read back as the model: {said}")


def _says(fields: Mapping[str, Any], section: ModelSection, family: ModelFamily) -> bool:
    try:
        found, values, _ = read_config(fields)
        return found is family and meaning(parsed_section(values)) == meaning(section)
    except (ConfigError, ValidationError):
        return False


@dataclass(frozen=True)
class StoredTensor:
    """One tensor to write. `parts` are the logical tensors whose rows it contains, as (name, rows, place)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[tuple[str, slice, TensorPlace]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def make(self, read: Read) -> Tensor:
        whole = torch.zeros(self.shape, dtype=self.dtype)
        for name, rows, place in self.parts:
            part = read(name)[rows]
            if place.strides:
                whole.as_strided(part.shape, place.strides, place.begin).copy_(part)
            else:
                whole.view(-1)[place.begin : place.begin + part.numel()] = part.flatten()
        # The tensor is checked piece by piece, because `isfinite` allocates tensors of its argument's size.
        if not all(torch.isfinite(piece).all() for piece in whole.view(-1).split(1 << 16)):
            count = int((~torch.isfinite(whole)).sum())
            damaged = [name for name, rows, _ in self.parts if not torch.isfinite(read(name)[rows]).all()]
            cause = f"some weights are too large for {self.dtype}; take --dtype float32 or bfloat16"
            if damaged:
                cause = f"{', '.join(damaged)} of the checkpoint has such numbers; export an earlier checkpoint"
            raise DataError(f"{self.name}: {count} of {whole.numel()} numbers would be infinite or NaN: {cause}")
        return whole


def _stored_tensors(found: Sequence[Slot], dtypes: Mapping[str, str]) -> list[StoredTensor]:
    """Lists the tensors to write. If the parts of a tensor have several dtypes, it gets a dtype that can represent all
    their values."""
    stored: dict[str, StoredTensor] = {}
    for slot in found:
        for place, rows in slot.pieces():
            dtype, part = DTYPES[dtypes[slot.name]], (slot.name, rows, place)
            before = stored.get(place.name, StoredTensor(place.name, place.shape, dtype, []))
            dtype = torch.promote_types(before.dtype, dtype)
            stored[place.name] = replace(before, dtype=dtype, parts=[*before.parts, part])
    return list(stored.values())


def _write(folder: Path, read: Read, stored: Sequence[StoredTensor], shard_bytes: int, report: Report) -> int:
    parts = list(shards(((each, each.nbytes) for each in stored), shard_bytes))
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    names = [WEIGHTS_FILE] if len(parts) == 1 else names
    done = 0
    for name, shard in zip(names, parts, strict=True):
        tensors: dict[str, Tensor] = {}
        for each in shard:
            tensors[each.name] = each.make(read)
            done += 1
            report("export", done, len(stored))
        write_tensors(folder / name, tensors, {"format": "pt"})
    if len(parts) > 1:
        weight_map = {each.name: name for name, shard in zip(names, parts, strict=True) for each in shard}
        index = {"metadata": {"total_size": sum(each.nbytes for each in stored)}, "weight_map": weight_map}
        write_durably(folder / INDEX_FILE, json.dumps(index, indent=2).encode())
    return len(parts)
