"""Exports a checkpoint as a Hugging Face folder for transformers 4 and 5, with one tensor per expert and matrix.

Hugging Face models have no null experts. An export can leave out null experts only if the router rows of the null experts
are bit-equal to rows of true (not null) experts, as `moe_dist.moe.routers.copy_init` made them: the model then computes the
same as a model without null experts and with a smaller top_k. If training has changed these rows, the number of true
experts differs between tokens, and no Hugging Face family can compute that.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.checkpoint.base import KEY as BASE
from moe_dist.checkpoint.base import Base, find_base
from moe_dist.checkpoint.contents import Contents, open_checkpoint, open_shard
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.fingerprint import fingerprint, hexadecimal
from moe_dist.checkpoint.fits import DTYPES as OURS
from moe_dist.checkpoint.index import CheckpointProblem, DamagedError, shard_file
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX
from moe_dist.checkpoint.storage import open_tensors, sync, write_durably
from moe_dist.config.model_schema import ModelSection
from moe_dist.config.routers.top_k import TopKRouterSection
from moe_dist.config.schema import Config
from moe_dist.errors import CheckpointError, ConfigError, DataError
from moe_dist.hf.attention_fields import max_positions
from moe_dist.hf.families import FAMILIES, misfits, read_section, write_fields
from moe_dist.hf.family import ModelFamily
from moe_dist.hf.fields import INERT, read_json
from moe_dist.hf.importing import HUGGINGFACE, imported_values
from moe_dist.hf.merging import Read, check_mergeable, merged_reader
from moe_dist.hf.names import Slot, router_name, shards, slots
from moe_dist.hf.source import COMPANIONS, CONFIG_FILE, DTYPES, INDEX_FILE, WEIGHTS_FILE
from moe_dist.moe.routers.copy_init import folded_choices, uneven_twins
from moe_dist.runtime.progress import Report

SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    family: str  # `model_type`
    tensors: int
    shards: int
    folded: int  # number of null experts per layer that were left out
    like: Path | None  # folder from which fields of config.json and tokenizer files were taken
    merged: bool = False  # LoRA adapters were merged into their base


def export_model(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    family: str | None = None,
    like: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: Report = lambda stage, done, total: None,
) -> Exported:
    """Exports a checkpoint as the new folder `out`. Needs memory for one shard and for one tensor in fp32.

    Args:
        checkpoint: Folder of a checkpoint, or of a run or an import with a checkpoint.
        dtype: Dtype of all tensors, a key of `source.DTYPES`. None: the dtypes before the import, else the checkpoint's.
        family: `model_type` to write. None: the family before the import, else the first family that fits the model.
        like: Folder with a config.json and tokenizer files to take over. None: the folder `huggingface` of the import that
            the checkpoint is in, or of `run.init_from`, if it exists.

    Raises:
        ConfigError: `out` exists, or no family fits the model; gives the reasons.
        DataError: the checkpoint is damaged or incomplete.
        CheckpointError: `out` cannot be written.
    """
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists; nothing is overwritten: remove it, or choose another folder")
    contents = open_checkpoint(find_checkpoint(checkpoint))
    if merged := BASE in contents.state.values:
        contents, read = _merged(contents)
    else:
        read = tensor_reader(contents)
    config = checked_config(contents)
    noted, dtypes = imported_values(contents.state.values)
    dtypes = {} if merged else dtypes  # no dtypes of an import, because a merged matrix needs more bits than its base
    section = _plain_section(config.model, read)
    chosen = _family(section, family or noted, must=family is not None)
    found = _account(contents, config.model, section, chosen)
    like = like or _like(contents.folder, config)
    wanted = {slot.name: dtype or dtypes.get(slot.name) or _stored(contents, slot.name) for slot in found}
    fields = _fields(section, chosen, like, list(wanted.values()))
    with new_folder(out) as folder:
        num_shards = _write(folder, read, found, wanted, shard_bytes, report)
        write_durably(folder / CONFIG_FILE, (json.dumps(fields, indent=2) + "\n").encode())
        for name in COMPANIONS if like else ():
            if like and (like / name).is_file():
                write_durably(folder / name, (like / name).read_bytes())
    nulls = sum(group.num_null for group in config.model.moe.groups.values())
    return Exported(chosen.name, len(found), num_shards, nulls, like, merged)


def _merged(adapters: Contents) -> tuple[Contents, Read]:
    """Returns the base of LoRA adapters, and a function that reads a tensor of the base and merges its adapters into it.

    Raises:
        ConfigError: the adapters cannot be merged.
        DataError: the base is missing or damaged, or is not the base on which the adapters were trained.
    """
    model = checked_config(adapters).model
    check_mergeable(model)
    base = find_base(Base.noted(adapters.state.values, adapters.folder), adapters.folder)
    return base, merged_reader(tensor_reader(base), tensor_reader(adapters), base.index, adapters.index, model)


def checked_config(contents: Contents) -> Config:
    """Returns the configuration of a checkpoint. Raises DataError if this version cannot read it."""
    saved = contents.state.values.get("config")
    try:
        return Config.model_validate_json(json.dumps(saved))
    except ValidationError as error:
        raise DataError(
            f"{contents.folder}: its state.json has no configuration that this version can read: {str(error)[:200]}"
        ) from error


def _plain_section(model: ModelSection, read: Read) -> ModelSection:
    """Returns the section of the equal model without null experts.

    Raises:
        ConfigError: no such model exists, or no family has a feature of the model; gives the reasons.
    """
    moe, problems = model.moe, []
    if len(moe.groups) > 1:
        raise ConfigError(
            f"model.moe.groups: {', '.join(moe.groups)}: families have one group of experts, not one a modality"
        )
    ((name, group),) = moe.groups.items()
    if group.num_identity or group.num_constant:
        free = f"num_identity={group.num_identity}, num_constant={group.num_constant}"
        problems.append(f"model.moe.groups.{name}: {free}: no known family has identity or constant experts")
    if model.mixture_of_depths:
        problems.append("model.mixture_of_depths: no known family leaves tokens out of its layers")
    if problems:
        raise ConfigError(problems, see="docs/huggingface.md")
    top_k, router = group.top_k, moe.router
    if group.num_null:
        top_k = _folded(model, read)
    if isinstance(router, TopKRouterSection) and (router.normalise == "true_all" or group.num_experts == 1):
        normalise = "none" if group.num_experts > 1 else "true_chosen"
        router = router.model_copy(update={"normalise": normalise})
    plain = {name: group.model_copy(update={"num_null": 0, "top_k": top_k})}
    return model.model_copy(update={"moe": moe.model_copy(update={"groups": plain, "router": router})})


def _folded(model: ModelSection, read: Read) -> int:
    """Returns the top_k with which the router without null rows chooses the same true experts with the same weights.

    Raises:
        ConfigError: there is none; names the layer or the option that prevents it.
    """
    ((name, group),) = model.moe.groups.items()
    key = f"model.moe.groups.{name}.num_null={group.num_null}"
    out = "no family has null experts; they can be left out only where they are copies of true rows, as after an import"
    router = model.moe.router
    if not isinstance(router, TopKRouterSection) or router.selection_bias:
        raise ConfigError(f"{key}: {out}; copies change the choices of a router with {router.said}")
    if router.normalise not in ("true_chosen", "true_all"):
        raise ConfigError(f"{key}: {out}, and weights do not see them; router.normalise={router.normalise}")
    if problem := uneven_twins(group.num_experts, group.num_null):
        raise ConfigError(f"{key}: {out}: {problem}")
    for layer in model.moe_layers:
        true, null = (read(router_name(model, layer, kind)) for kind in ("true", "null"))
        if not torch.equal(null, true.repeat(group.num_null // group.num_experts, 1)):
            raise ConfigError(
                f"{key}: {out}; in layer {layer} they are not. The number of experts that a token takes is learned there, "
                "and would be lost; export a model that was trained with num_null=0"
            )
    return folded_choices(group.num_experts, group.num_null, group.top_k)


def _family(section: ModelSection, name: str | None, *, must: bool) -> ModelFamily:
    if name is not None and name not in FAMILIES:
        raise ConfigError(f"--family={name}: known are {', '.join(FAMILIES)}")
    order = [FAMILIES[name]] if name and must else sorted(FAMILIES.values(), key=lambda each: each.name != name)
    reasons = {family.name: misfits(section, family) for family in order}
    for family in order:
        if not reasons[family.name]:
            return family
    raise ConfigError(
        [f"{family}: cannot have {', '.join(what)}" for family, what in reasons.items()], see="docs/huggingface.md"
    )


def _account(contents: Contents, model: ModelSection, section: ModelSection, family: ModelFamily) -> list[Slot]:
    """Returns the tensors to write. Checks that they are all parameters of the checkpoint that have an effect.

    Raises:
        DataError: the checkpoint lacks a tensor, or has one of another shape or one for which the family has no place.
    """
    needed = slots(section, family)
    there = {name for name in contents.index.tensors if not name.startswith(OPTIMIZER_PREFIX)}
    nulls = {router_name(model, layer, "null") for layer in model.moe_layers}
    problems = [f"{slot.name}: is missing" for slot in needed if slot.name not in there]
    problems += [
        f"{name}: is left over: {family.name} has no place for it" for name in there - nulls - {s.name for s in needed}
    ]
    problems += [
        f"{slot.name}: shape {contents.index.tensors[slot.name].shape}, its configuration calls for {slot.shape}"
        for slot in needed
        if slot.name in there and contents.index.tensors[slot.name].shape != slot.shape
    ]
    if problems:
        raise DataError([f"{contents.folder}: {problem}" for problem in sorted(problems)])
    return [slot for slot in needed if slot.places]


def _stored(contents: Contents, name: str) -> str:
    found = contents.index.tensors[name].dtype
    if found not in DTYPES:
        raise ConfigError(f"{name} is {found}; say --dtype {', '.join(DTYPES)}")
    return found


def _like(folder: Path, config: Config) -> Path | None:
    beside = [folder.absolute().parent / HUGGINGFACE]
    beside += [Path(config.run.init_from) / HUGGINGFACE] if config.run.init_from else []
    return next((each for each in beside if (each / CONFIG_FILE).is_file()), None)


def _fields(section: ModelSection, family: ModelFamily, like: Path | None, dtypes: Sequence[str]) -> dict[str, Any]:
    """Returns the fields of config.json: those of `like` if they describe the model; else the fields of `write_fields`, and
    all other fields of `like`."""
    base = read_json(like / CONFIG_FILE, "model") if like else {}
    said = write_fields(section, family)
    inert = {name: value for name, value in base.items() if name in INERT}
    dtype = str(DTYPES[max(DTYPES, key=dtypes.count)]).removeprefix("torch.")
    of_family = base if base.get("model_type") == family.name else inert
    for fields in (base, {**of_family, **said}, {**inert, **said}):
        if _says(fields, section, family):
            keys = [key for key in ("dtype", "torch_dtype") if key in fields] or ["torch_dtype", "dtype"]
            return {**fields, **dict.fromkeys(keys, dtype)}
    raise AssertionError(f"config.json of {family.name} does not read back as the model: {said}")


def _says(fields: Mapping[str, Any], section: ModelSection, family: ModelFamily) -> bool:
    try:
        found, values, _ = read_section(fields)
        return found is family and _canonical(ModelSection.model_validate(values)) == _canonical(section)
    except (ConfigError, ValidationError):
        return False


def _canonical(section: ModelSection) -> dict[str, Any]:
    """Returns the values of a section that determine what the model computes, in one form for all equivalent sections."""
    (group,) = section.moe.groups.values()
    dense = len(section.moe_layers) < section.num_layers
    plain = section.model_dump(exclude={"moe", "init_std", "head_dim", "dense_ffn_dim"})
    return {
        **plain,
        "head_dim": section.resolved_head_dim,
        "rope_dim": section.rope_dim or section.resolved_head_dim,
        "max_seq_len": max_positions(section),
        "sliding_layers": section.windows,
        "dense_ffn_dim": section.dense_ffn_dim if dense else None,
        "layers": section.moe_layers,
        "experts": (group.num_experts, group.top_k, group.ffn_dim),
        "router": section.moe.router.model_dump(exclude={"null_logit"}),
        "shared": (section.moe.shared_ffn_dim, section.moe.shared_gate),
    }


def tensor_reader(contents: Contents) -> Read:
    """Makes a function that reads a whole logical tensor of a checkpoint and compares it with its fingerprint.

    The function raises DataError if the tensor is missing or damaged.
    """

    def read(name: str) -> Tensor:
        entry = contents.index.tensors.get(name)
        if entry is None:
            raise DataError(f"{contents.folder}: {name}: is missing")
        whole = torch.empty(entry.shape, dtype=OURS[entry.dtype])
        for chunk in entry.chunks:
            open_shard(contents, chunk.shard)
            with open_tensors(contents.folder, chunk.shard) as file:
                box = tuple(slice(at, at + length) for at, length in zip(chunk.offsets, chunk.shape, strict=True))
                whole[box] = file.get_tensor(name)
        if hexadecimal(fingerprint(whole)) != entry.fingerprint:
            files = ", ".join(dict.fromkeys(shard_file(chunk.shard) for chunk in entry.chunks))
            found = CheckpointProblem("damaged", files, "its bits are not those that were saved", name)
            raise DamagedError(f"checkpoint {contents.folder} is not what was saved", [found])
        return whole

    return read


def _write(
    folder: Path, read: Read, found: Sequence[Slot], dtypes: Mapping[str, str], shard_bytes: int, report: Report
) -> int:
    """Writes the safetensors files, and an index if there are several; returns the number of files."""
    sizes = [slot.numel * DTYPES[dtypes[slot.name]].itemsize for slot in found]
    parts = list(shards(zip(found, sizes, strict=True), shard_bytes))
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    names = [WEIGHTS_FILE] if len(parts) == 1 else names
    done = 0
    for name, shard in zip(names, parts, strict=True):
        tensors: dict[str, Tensor] = {}
        for slot in shard:
            place = slot.places[0]
            tensors[place.name] = read(slot.name).to(DTYPES[dtypes[slot.name]]).view(place.shape)
            done += 1
            report("export", done, len(found))
        save_file(tensors, folder / name, metadata={"format": "pt"})
        sync(folder / name)
    if len(parts) > 1:
        weight_map = {slot.places[0].name: name for name, shard in zip(names, parts, strict=True) for slot in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        write_durably(folder / INDEX_FILE, json.dumps(index, indent=2).encode())
    return len(parts)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Makes a temporary folder beside `out`. At the end of the `with` block syncs the folder and renames it to `out`; after
    an error removes it."""
    folder = out.absolute().parent / f"{out.absolute().name}.exporting.{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made: {error.strerror or error}") from error
    try:
        yield folder
        sync(folder)
        if os.path.lexists(out):
            raise ConfigError(f"{out} exists by now; nothing is overwritten")
        folder.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
