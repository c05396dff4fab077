"""Reads whole tensors of a checkpoint, and merges LoRA adapters into the matrices of their base: W becomes W + (alpha / r)
B A.

A matrix and its adapters can be merged only if all tokens that use the matrix also use these adapters with equal weights.
This always holds for adapters of attention and of an MoE base's experts. For LoRA experts on an FFN it requires

- one expert group, because tokens of another group would use other adapters,
- no null experts, because a token that chooses a null expert uses the FFN without an adapter, and
- one expert, whose weight is then exactly 1; or several experts that every token chooses (top_k = num_experts) with a
  weight of exactly 1 (straight_through, published). The products B A of several experts are summed.

Otherwise the merge is refused.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moe_dist.checkpoint.base import GUIDE, base_names
from moe_dist.checkpoint.contents import Contents, open_shard
from moe_dist.checkpoint.fingerprint import fingerprint, hexadecimal
from moe_dist.checkpoint.fits import DTYPES
from moe_dist.checkpoint.index import CheckpointProblem, DamagedError, shard_file
from moe_dist.checkpoint.storage import open_tensors
from moe_dist.config.experts.ffn import AdaptedFFNExpertsSection
from moe_dist.config.experts.lora import LoRAExpertsSection
from moe_dist.config.model_schema import ModelSection
from moe_dist.errors import ConfigError, DataError
from moe_dist.placement.parameter_names import EXPERT_NAME

Read = Callable[[str], Tensor]

_ATTENTION = re.compile(r"(?P<layer>layers\.\d+\.attention)\.(?P<target>[a-z_]+)\.weight")
_SHARED = re.compile(r"(layers\.\d+\.moe\.shared\.(?:gate|up|down))\.weight")
_TARGETS = {"gate": "gate_up", "up": "gate_up", "down": "down"}  # maps a matrix of an FFN expert to its adapter's name
_FFN = re.compile(r"layers\.(?P<layer>\d+)\.moe\.ffn\.(?P<target>gate|up|down)")


def tensor_reader(contents: Contents) -> Read:
    """Makes a function that reads a whole logical tensor of a checkpoint and verifies its fingerprint.

    The made function raises DataError if the tensor is missing or damaged.
    """

    checked: set[int] = set()

    def read(name: str) -> Tensor:
        entry = contents.index.tensors.get(name)
        if entry is None:
            raise DataError(f"{contents.folder}: {name}: is missing")
        whole = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        for chunk in entry.chunks:
            if chunk.shard not in checked:  # once per shard, because its header names all tensors in it
                open_shard(contents, chunk.shard)
                checked.add(chunk.shard)
            with open_tensors(contents.folder, chunk.shard) as file:
                box = tuple(slice(at, at + length) for at, length in zip(chunk.offsets, chunk.shape, strict=True))
                whole[box] = file.get_tensor(name)
        if hexadecimal(fingerprint(whole)) != entry.fingerprint:
            files = ", ".join(dict.fromkeys(shard_file(chunk.shard) for chunk in entry.chunks))
            found = CheckpointProblem("damaged", files, "its bits are not those that were saved", name)
            raise DamagedError(f"checkpoint {contents.folder} is not what was saved", [found])
        return whole

    return read


def _check_mergeable(model: ModelSection) -> None:
    experts, groups, problems = model.moe.experts, model.moe.groups, []
    if not isinstance(experts, LoRAExpertsSection):
        return
    if len(groups) > 1:
        problems.append(f"model.moe.groups: {', '.join(groups)}: tokens of different groups have different adapters")
    for name, group in groups.items():
        key = f"model.moe.groups.{name}"
        if group.num_null:
            problems.append(f"{key}.num_null={group.num_null}: a token that chooses null experts takes no adapter")
        if group.top_k < group.num_experts:
            problems.append(
                f"{key}.top_k={group.top_k} of num_experts={group.num_experts}: the router chooses the adapters"
            )
        elif group.num_experts > 1 and experts.weight == "probability":
            problems.append(
                f"model.moe.experts.weight=probability: the weights of {key}'s experts differ from token to token"
            )
    if problems:
        fix = (
            "no family has LoRA experts; export a run with one expert in one group (num_experts=1, num_null=0), or use the "
            "run itself (tools.evaluate, tools.generate)"
        )
        raise ConfigError([f"{problem}; {fix}" for problem in problems], see=GUIDE)


def merged_reader(base: Contents, adapters: Contents, model: ModelSection) -> Read:
    """Makes a function that reads a tensor of the base and merges adapters into it, in fp32. A tensor that the checkpoint
    of adapters contains whole, such as the router of an MoE base, is read from there. `model` is the section of the
    adapters' run. Raises ConfigError, with all reasons, if the adapters cannot be merged."""
    _check_mergeable(model)
    ffn_names, read_base, read_adapters = base_names(base.index), tensor_reader(base), tensor_reader(adapters)

    def read(name: str) -> Tensor:
        if name in adapters.index.tensors:
            return read_adapters(name)
        whole = read_base(name)
        for a, b, scale in _pairs(name, ffn_names, model):
            if a in adapters.index.tensors:
                rows = read_adapters(b)
                if rows.shape[-2] == 2 * len(whole):  # gate and up share one adapter
                    rows = rows.chunk(2, dim=-2)[name.endswith(".up")]
                whole = whole + scale * _product(rows, read_adapters(a)).to(whole.dtype)
        return whole

    return read


def _pairs(name: str, ffn_names: Mapping[str, str], model: ModelSection) -> list[tuple[str, str, float]]:
    """Returns (name of A, name of B, alpha / r) for each adapter of the base's matrix `name`. Empty if it has none."""
    if (match := _ATTENTION.fullmatch(name)) and model.attention_lora is not None:
        prefix, lora = f"{match['layer']}.adapters.{match['target']}", model.attention_lora
        return [(f"{prefix}.a", f"{prefix}.b", lora.alpha / lora.rank)]
    match, experts = EXPERT_NAME.fullmatch(name), model.moe.experts
    if match and match["tensor"] in _TARGETS and isinstance(experts, AdaptedFFNExpertsSection):
        target, stem = _TARGETS[match["tensor"]], f"{match['layer']}.moe.experts.{match['group']}"
        prefix = f"{stem}.adapters.{target}." if experts.shared else f"{stem}.{match['expert']}.{target}_"
        return [(f"{prefix}a", f"{prefix}b", experts.alpha / experts.rank)]
    if (match := _SHARED.fullmatch(name)) and isinstance(experts := model.moe.experts, AdaptedFFNExpertsSection):
        return [(f"{match[1]}.adapter.a", f"{match[1]}.adapter.b", experts.alpha / experts.rank)]
    match, experts = _FFN.fullmatch(ffn_names.get(name, "")), model.moe.experts
    if match is None or not isinstance(experts, LoRAExpertsSection):
        return []
    (group,) = model.moe.groups
    prefix = f"layers.{match['layer']}.moe.adapters.{group}.{match['target']}"
    return [(f"{prefix}_a", f"{prefix}_b", experts.alpha / experts.rank)]


def _product(b: Tensor, a: Tensor) -> Tensor:
    """Returns B A in float64, so that only the caller rounds it. If A and B are stacks, sums the products over the
    experts."""
    product = b.double() @ a.double()
    return product.sum(0) if product.ndim == 3 else product
