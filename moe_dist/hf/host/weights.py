"""Reads the weights of a hosted model from a Hugging Face folder, and writes them to one."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.whole_tensors import tensor_reader
from moe_dist.config.model_schema import MoESection
from moe_dist.errors import ConfigError
from moe_dist.hf.adapters import write_peft
from moe_dist.hf.exporting import checked_config
from moe_dist.hf.host.banks import GUIDE
from moe_dist.hf.host.dense_files import FAMILY, CopiedTensors, adapters_by_expert, is_adapted, merge_experts, write_dense
from moe_dist.hf.host.lora import MATRICES
from moe_dist.hf.host.lora_names import hosted_tensors
from moe_dist.hf.host.model import HostedModel
from moe_dist.hf.source import open_source

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"\blayers\.\d+\.")


@torch.no_grad()
def read_folder(
    model: HostedModel, folder: Path, local: Sequence[int], set_whole: Callable[[Tensor, Tensor], object] = Tensor.copy_
) -> None:
    """Reads this rank's experts, and its shards of all other weights, from a folder's safetensors files. transformers' own
    conversion renames and joins the tensors. Host memory holds the tensors of one layer at a time.

    Args:
        set_whole: Copies a whole tensor into a parameter, of which this rank may have a shard.

    Raises:
        DataError: files are missing, damaged, pickled or quantised (`open_source`).
        ConfigError: tensors are missing or unknown, or their shapes contradict the configuration.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        convert_and_load_state_dict_in_model,
        rename_source_key,
    )
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    family, by_layer = model.family, dict[str, dict[str, Any]]()
    mapping: Any = get_model_conversion_mapping(family)
    _split_by_bank(mapping, [len(bank.local(local)) for bank in model.banks if bank.layer == model.banks[0].layer])
    stacks = tuple(f"{path}." for path, module in family.named_modules() if hasattr(module, "_is_expert_parallel"))
    renamings: list[Any] = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters: list[Any] = [each for each in mapping if isinstance(each, WeightConverter)]
    state = family.state_dict()
    routers, num_experts = model.router_weights(), int(cast(Any, model.moe_modules()[0].router).num_experts)
    source = open_source(folder)
    files = {name: safe_open(folder / name, framework="pt") for name in source.files}
    copied = CopiedTensors(model, local)
    for name, stored in source.tensors.items():
        tensor = files[stored.file].get_slice(name)
        plain = name.removeprefix(f"{FAMILY}.") if copied.banks else name  # an export of `write_dense` has the prefix
        target, _ = rename_source_key(plain, renamings, converters, family.base_model_prefix, state)
        if copied.takes(target, tensor):
            continue
        mine = _of_this_rank(plain, tensor, local, stacked=target.startswith(stacks))
        if target in routers and tensor.get_shape()[0] == num_experts:  # null rows repeat the true ones (AdaMoE)
            mine = plain, _Slice(tensor, [row % num_experts for row in range(state[target].shape[0])])
        if mine is not None:
            layer = _LAYER.search(name)
            by_layer.setdefault(layer[0] if layer else "", {})[mine[0]] = mine[1]
    missing = {name for name, each in state.items() if each.numel() and not name.endswith(MATRICES)}
    missing -= copied.copy(set_whole)
    faults: dict[str, set[str]] = {"unknown": set(), "of another shape": set(), "not converted": set()}
    why = ""  # such as a lack of memory
    for slices in by_layer.values():
        settings = LoadStateDictConfig(weight_mapping=deepcopy(mapping), dtype=torch.float32)
        before = _tensors_of(family)
        # transformers shards before it converts, which is wrong for stacks that it transposes or splits into banks. It gets
        # whole stacks instead, and `set_whole` shards the result.
        for name, old in before.items():
            if isinstance(old, DTensor) and name.startswith(stacks):
                _put(family, name, nn.Parameter(torch.empty(old.shape, device="meta")))
        info, _ = convert_and_load_state_dict_in_model(family, slices, settings)
        missing &= info.missing_keys
        faults["unknown"] |= set(info.unexpected_keys)
        faults["of another shape"] |= {str(each[0]) for each in info.mismatched_keys}
        faults["not converted"] |= set(info.conversion_errors)
        for error in info.conversion_errors.values():
            why = f" ({error.splitlines()[-2].strip()})"  # a traceback, the exception again, and the tensor
        # The loader makes new tensors on the host. Their values are copied, because optimizer, FSDP2 and DDP use the old
        # ones.
        for name, new in _tensors_of(family).items():
            old = before[name]
            if new is not old:
                if not new.is_meta:
                    (Tensor.copy_ if isinstance(new, DTensor) else set_whole)(old, new)
                _put(family, name, old)
    faults["missing"] = missing - set(getattr(family, "all_tied_weights_keys", {}) or {})
    for what, patterns in {
        "missing": family._keys_to_ignore_on_load_missing,
        "unknown": family._keys_to_ignore_on_load_unexpected,
    }.items():
        faults[what] = {name for name in faults[what] if not any(re.search(each, name) for each in patterns or ())}
    for what, names in faults.items():
        if names:
            raise ConfigError(
                f"model.folder={str(folder)!r}: {len(names)} tensors are {what}, such as {min(names)}"
                f"{why if what == 'not converted' else ''}; take a folder whose config.json is of these weights",
                see=GUIDE,
            )


def _put(family: nn.Module, name: str, tensor: Tensor) -> None:
    """Sets a parameter or buffer in its module's table, past the checks of `nn.Module.__setattr__`."""
    owner, _, leaf = name.rpartition(".")
    module = family.get_submodule(owner)
    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = cast(Any, tensor)


def _tensors_of(family: Any) -> dict[str, Any]:
    """Returns parameters and buffers by name."""
    return {**dict(family.named_parameters(remove_duplicate=False)), **dict(family.named_buffers(remove_duplicate=False))}


class _Slice:
    """A tensor of a safetensors file with only the rows of this rank's experts. It is read when transformers slices it."""

    def __init__(self, tensor: Any, rows: Sequence[int] | None) -> None:
        self._tensor, self._rows = tensor, rows

    def get_shape(self) -> list[int]:
        shape = list(self._tensor.get_shape())
        return shape if self._rows is None else [len(self._rows), *shape[1:]]

    def get_dtype(self) -> str:
        return self._tensor.get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        if self._rows is None:
            return self._tensor[index]
        parts = [self._tensor[row : row + 1] for row in self._rows]
        return (torch.cat(parts) if parts else self._tensor[:0])[index]


def _of_this_rank(name: str, tensor: Any, local: Sequence[int], *, stacked: bool) -> tuple[str, Any] | None:
    """Returns the name and the tensor, reduced to this rank's experts; None for an expert of another rank.

    Args:
        stacked: Whether the tensor goes into a stack of experts. It has one expert, or all of them.
    """
    expert = _EXPERT.search(name) if stacked else None
    if expert is None:
        return name, _Slice(tensor, local if stacked else None)
    if int(expert[1]) not in local:
        return None
    return f"{name[: expert.start(1)]}{local.index(int(expert[1]))}{name[expert.end(1) :]}", _Slice(tensor, None)


def _split_by_bank(mapping: Sequence[Any], sizes: Sequence[int]) -> None:
    """Changes transformers' conversion of weights so that it splits this rank's experts into banks of the given sizes,
    instead of banks of equal sizes."""
    for converter in mapping:
        for operation in getattr(converter, "operations", ()):
            if hasattr(operation, "split_list_into_chunks"):
                operation.convert = partial(_joined_banks, operation, sizes)


def _joined_banks(operation: Any, sizes: Sequence[int], found: Any, **more: Any) -> dict[str, Tensor]:
    joined, start, targets = dict[str, Tensor](), 0, more["target_patterns"]
    for target, size in zip(targets, sizes, strict=True):
        if size:
            stacks = [
                torch.stack(found[each][start : start + size], operation.stack_dim) for each in more["source_patterns"]
            ]
            joined[target] = torch.cat(stacks, operation.concat_dim)
        else:  # torch cannot stack an empty list
            shape = more["model"].get_parameter(more["full_layer_name"].replace(targets[0], target)).shape
            joined[target] = torch.empty(shape)
        start += size
    return joined


def write_folder(model: HostedModel, out: Path, groups: Mapping[str, Any] | None = None) -> None:
    """Writes a model that holds all experts as the family's own Hugging Face folder, in shards of 4 GB. A family without
    experts is written with code. `groups` is what `groups_of` returns for such a model.

    Raises:
        ConfigError: a layer of such a model has several LoRA experts.
    """
    assert not any(isinstance(each, DTensor) for each in model.parameters()), "the caller loads a model of one rank"
    if not hasattr(model.family, "moe_dist_banks"):
        model.family.save_pretrained(out, max_shard_size="4GB")
    elif is_adapted(model.family):
        merge_experts(model.family)
        model.family.save_pretrained(out, max_shard_size="4GB")
    else:
        write_dense(model.family, out, groups or {})


def export_hosted_adapters(checkpoint: Path, out: Path, *, base_name: str | None = None) -> int:
    """Exports the adapters of a run on a transformers model, as `moe_dist.hf.adapters.export_adapters` does for other runs.
    The base is the run's `model.folder`."""
    contents = open_checkpoint(find_checkpoint(checkpoint))
    model = checked_config(contents).model
    if model.moe.experts.over_frozen_ffn:
        return adapters_by_expert(out, model, base_name, tensor_reader(contents))
    if model.lora is None:
        raise ConfigError(f"{contents.folder}: holds no adapters, model.lora is null; export it without --adapters")
    refuse_masked(model.moe)
    base = Path(str(model.folder)).absolute()
    return write_peft(out, model, base_name or str(base), base, hosted_tensors(model, tensor_reader(contents)))


def refuse_masked(moe: MoESection) -> None:
    """Raises ConfigError if tokens leave out choices of the family's router, because transformers cannot do so."""
    nulls = [f"model.moe.groups.{name}.num_null={group.num_null}" for name, group in moe.groups.items() if group.num_null]
    if nulls or not moe.router.softmax_top_k:
        raise ConfigError(
            f"{nulls[0] if nulls else moe.router.name}: transformers would load the export as a model whose tokens take "
            "all choices; to export a model with null experts, train it as this project's own (`moe-dist import-hf "
            "--null-experts`), whose exports bring their code",
            see=GUIDE,
        )
