"""LoRA adapters of a hosted model, on linear layers and on stacks of experts, with the names and shapes of PEFT.

An adapter adds alpha / rank times B A to a weight. A and B are parameters of the same module as the weight. So the base's
weights keep their names, and each rank has the adapters of its own experts.

Shape letters: E experts, r rank, I inputs, O outputs.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.experts.lora import HostedLoRASection
from moe_dist.errors import ConfigError
from moe_dist.hf.host.banks import GUIDE, banks_of
from moe_dist.hf.peft_files import joint, open_peft, stacked
from moe_dist.hf.source import DTYPES
from moe_dist.model.initial_weights import normal_tensor
from moe_dist.placement.parameter_names import Role

MATRICES = ("lora_A", "lora_B")


class Place(NamedTuple):
    """A weight that has an adapter."""

    module: str  # path in the family's model
    stack: str  # name of the stack of experts, or "" for the weight of a linear layer
    peft: str  # name of the adapter in PEFT's files
    num_experts: int = 1

    def names(self) -> list[str]:
        """Returns the names of A and B among the module's parameters."""
        return [f"{self.stack}_{each}" if self.stack else each for each in MATRICES]


def places_in(family: Any, lora: HostedLoRASection) -> tuple[Place, ...]:
    """Returns the weights of a whole model that have an adapter."""
    linear, stacks = candidates(family)
    found = [Place(path, "", f"base_model.model.{path}") for path in linear if has_end(path, lora.targets)]
    wrapped: dict[str, list[str]] = {}
    for path in stacks:
        if has_end(path, lora.parameters):
            module, _, stack = path.rpartition(".")
            wrapped.setdefault(module, []).append(stack)
    for module, names in wrapped.items():
        for place, stack in enumerate(names):  # PEFT wraps the first parameter first: its wrapper is the innermost
            inner = ".base_layer" * (len(names) - 1 - place)
            num_experts = family.get_submodule(module).get_parameter(stack).shape[0]
            found.append(Place(module, stack, f"base_model.model.{module}{inner}", num_experts))
    return tuple(found)


def candidates(family: Any) -> tuple[list[str], list[str]]:
    """Returns two lists of paths: all linear layers except routers, and all stacks of experts."""
    banks = banks_of(family)
    routers = {each for bank in banks for each in family.get_submodule(bank.router).modules()}
    modules = family.named_modules()
    linear = [path for path, each in modules if isinstance(each, nn.Linear) and each not in routers]
    parameters = [(bank.experts, family.get_submodule(bank.experts).named_parameters(recurse=False)) for bank in banks]
    stacks = [f"{path}.{name}" for path, own in parameters for name, each in own if each.ndim == 3]
    return linear, stacks


def has_end(path: str, ends: Sequence[str]) -> bool:
    return any(path == end or path.endswith(f".{end}") for end in ends)


def add_adapters(family: Any, lora: HostedLoRASection) -> tuple[Place, ...]:
    """Adds uninitialised A and B for each adapted weight of a model with all experts. Returns these weights."""
    places = places_in(family, lora)
    for place in places:
        module = family.get_submodule(place.module)
        weight = getattr(module, place.stack or "weight")
        *stack, out, into = weight.shape
        if place.stack and getattr(module, "is_transposed", False):
            out, into = into, out
        a, b = place.names()
        module.register_parameter(a, nn.Parameter(weight.new_empty(*stack, lora.rank, into)))
        module.register_parameter(b, nn.Parameter(weight.new_empty(*stack, out, lora.rank)))
        role = Role.EXPERT_ADAPTER if place.stack else Role.ADAPTER
        module.roles = {**getattr(module, "roles", {}), a: role, b: role}
        module.lora_scaling = lora.alpha / lora.rank
        if not place.stack:
            module.lora_hook = module.register_forward_hook(_add)
    return places


def _add(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output + F.linear(F.linear(inputs[0], module.lora_A), module.lora_B) * module.lora_scaling


def fold(experts: Any, weights: dict[str, Tensor | None]) -> None:
    """Adds the adapters of a module of experts to its stacks; `weights` has both by name. The order of operations is
    PEFT's, so B A is never a separate tensor in memory."""
    for name, a in list(weights.items()):
        if name.endswith(MATRICES[0]) and a is not None:
            stack = name.removesuffix(f"_{MATRICES[0]}")
            base, b = weights[stack], weights[f"{stack}_{MATRICES[1]}"]
            assert base is not None
            assert b is not None
            factors = (a.mT, b.mT) if getattr(experts, "is_transposed", False) else (b, a)
            weights[stack] = torch.baddbmm(base, *factors, alpha=experts.lora_scaling)


@torch.no_grad()
def merge_adapters(family: Any, places: Sequence[Place]) -> None:
    """Adds the adapters to the weights of a model of one rank, and removes them."""
    for place in places:
        module: Any = family.get_submodule(place.module)
        if place.stack:
            weights = dict(module._parameters)
            fold(module, weights)
            module._parameters[place.stack].copy_(weights[place.stack])
        else:
            module.weight.add_(module.lora_B @ module.lora_A, alpha=module.lora_scaling)
            module.lora_hook.remove()
        for name in place.names():
            del module._parameters[name]


def first_values(
    model: Any, lora: HostedLoRASection, slots: Sequence[int], seed: int
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yields each adapter matrix and its initial value in a new run. The values are read from `lora.folder`. Without a
    folder, A is drawn from (seed, name) with PEFT's variance 1 / (3 I), and B is 0. `slots` are the logical ids of this
    rank's experts.

    Raises:
        ConfigError: in the folder, rank, alpha or adapted weights differ from `lora`, or the adapters are no plain LoRA.
        DataError: files are missing or damaged.
    """
    local = {bank.experts: bank.local(slots) for bank in model.banks}
    matrices = [(place, matrix, name) for place in model.adapters for matrix, name in zip("AB", place.names(), strict=True)]
    if lora.folder is None:
        for place, matrix, name in matrices:
            parameter, path = model.family.get_submodule(place.module)._parameters[name], f"{place.module}.{name}"
            shape, std = tuple(parameter.shape), (3 * parameter.shape[-1]) ** -0.5 if matrix == "A" else 0.0
            drawn = [normal_tensor(f"{path}.{each}", shape[1:], seed=seed, std=std) for each in local.get(place.module, ())]
            whole = torch.stack(drawn) if drawn else torch.empty(shape)
            yield parameter, whole if place.stack else normal_tensor(path, shape, seed=seed, std=std)
        return
    key = f"model.lora.folder={lora.folder!r}"
    with open_peft(Path(lora.folder), lora) as tensors:
        wanted, there = {f"{place.peft}.lora_{matrix}.weight" for place, matrix, _ in matrices}, set(tensors.keys())
        if odd := sorted(wanted ^ there):
            whose = "the folder" if odd[0] in there else "model.lora"
            raise ConfigError(
                f"{key}: only {whose} has {odd[0]}; set model.lora.targets and parameters to the weights with adapters "
                "in the folder",
                see=GUIDE,
            )
        for place, matrix, name in matrices:
            parameter = model.family.get_submodule(place.module)._parameters[name]
            found = f"{place.peft}.lora_{matrix}.weight"
            if (dtype := tensors.get_slice(found).get_dtype()) not in DTYPES:
                problem = f"{key}: {found} is of dtype {dtype}; adapters must be {', '.join(DTYPES)}"
                raise ConfigError(f"{problem}; save them in one of these", see=GUIDE)
            whole = tensors.get_tensor(found)
            like = torch.empty(place.num_experts, *parameter.shape[-2:], device="meta")
            if whole.shape != joint(matrix, like).shape:
                problem = f"{key}: {found} is for a weight of another shape than that of model.folder"
                raise ConfigError(f"{problem}; take adapters of this model", see=GUIDE)
            yield parameter, stacked(matrix, whole, place.num_experts)[local[place.module] if place.stack else 0]
