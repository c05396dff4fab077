"""Determines the role and the logical name of each parameter. The logical name identifies the parameter in checkpoints and
is, with the seed, the source of its random initial values.

A module class sets the role of its parameters, for example by `role = Role.ROUTER`. A child module without a role inherits
its parent's role. A dict `roles` on a module sets the roles of single parameters that the module directly owns. The role is
not an attribute of the parameter, because FSDP2 and `Module.to_empty` replace parameters.

This file imports no torch, so that commands without torch can describe checkpoints.
"""

import re
from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # not imported at run time, because a login node may lack torch
    from torch import nn


class Role(Enum):
    """The purpose of a parameter, which decides its sharding, gradient sum, weight decay, initial value and freezing."""

    DENSE = "dense"
    EMBEDDING = "embedding"
    NORM = "norm"
    EXPERT = "expert"
    ZERO_COMPUTATION = "zero_computation"
    ROUTER = "router"
    DEPTH_ROUTER = "depth_router"
    AUXILIARY_ROUTER = "auxiliary_router"
    ADAPTER = "adapter"
    EXPERT_ADAPTER = "expert_adapter"  # an adapter of one expert; stacked and placed like the experts


ROUTERS = frozenset({Role.ROUTER, Role.DEPTH_ROUTER, Role.AUXILIARY_ROUTER})  # their parameters are replicated on all ranks
EXPERTS = frozenset({Role.EXPERT, Role.EXPERT_ADAPTER})  # stacks [e, ...] of the e experts that are placed on the rank
ADAPTERS = frozenset({Role.ADAPTER, Role.EXPERT_ADAPTER})
# Names of the output projection, whose role is DENSE, in this project's model and in transformers' models.
OUTPUT_NAMES = ("output.weight", "family.lm_head.weight")
EXPERT_NAME = re.compile(r"(?P<layer>layers\.\d+)\.moe\.experts\.(?P<group>[^.]+)\.(?P<expert>\d+)\.(?P<tensor>[^.]+)")

_GROUP = "group:"  # prefix of an expert group's module name; no attribute name contains a colon
_ROLES_OF_NAMES = (  # special patterns come first, because the first match decides
    (re.compile(r"layers\.\d+\.moe\.experts\.[^.]+\.adapters\..+"), Role.ADAPTER),
    (re.compile(r"layers\.\d+\.moe\.experts\..+_[ab]"), Role.EXPERT_ADAPTER),
    (re.compile(r"layers\.\d+\.moe\.experts\..+"), Role.EXPERT),
    (re.compile(r"layers\.\d+\.(moe\.router\.[^.]+|depths)\.auxiliary\..+"), Role.AUXILIARY_ROUTER),
    (re.compile(r"layers\.\d+\.moe\.router\..+"), Role.ROUTER),
    (re.compile(r"layers\.\d+\.depths\..+"), Role.DEPTH_ROUTER),
    (re.compile(r"layers\.\d+\.moe\.free\..+"), Role.ZERO_COMPUTATION),
    (re.compile(r"layers\.\d+\.((attention|moe)\.adapters|moe\.shared\.[a-z]+\.adapter)\..+"), Role.ADAPTER),
    (re.compile(r"embedding\.weight"), Role.EMBEDDING),
    (re.compile(r"(.+[._])?norm\.weight"), Role.NORM),
    # In transformers' models, experts and routers have these names in all families.
    (re.compile(r"family\..+\.experts\.\d+\..+_lora_[AB]"), Role.EXPERT_ADAPTER),
    (re.compile(r"family\..+\.experts\.\d+\..+"), Role.EXPERT),
    (re.compile(r"family\..+\.lora_[AB]"), Role.ADAPTER),
    (re.compile(r"family\..+\.(gate|router)\..+"), Role.ROUTER),
)


class NamedParameter(NamedTuple):
    """A parameter of a model. If the parameter is a stack of experts, its logical name has no expert index."""

    path: str
    name: str
    role: Role
    parameter: "nn.Parameter"


@cache  # called in each forward
def group_module(name: str) -> str:
    """Returns the name of an expert group's child module. Its prefix prevents a clash of a group name with an attribute."""
    return f"{_GROUP}{name}"


def logical_name(path: str) -> str:
    """Returns the logical name of a parameter or buffer: its name in the state dict, without the prefix of group names."""
    return path.replace(_GROUP, "")


def role_of_name(name: str) -> Role:
    """Returns the role of a checkpoint's tensor from its logical name, without a model. Optimizer moments have no role."""
    return next((role for pattern, role in _ROLES_OF_NAMES if pattern.fullmatch(name)), Role.DENSE)


def named_parameters(model: "nn.Module") -> Iterator[NamedParameter]:
    """Yields every parameter of a model once, in the order of `Module.named_parameters`."""
    roles: dict[str, Role] = {}
    _add_roles(model, "", Role.DENSE, roles)
    for path, parameter in model.named_parameters():
        yield NamedParameter(path, logical_name(path), roles[path], parameter)


def _add_roles(module: "nn.Module", prefix: str, inherited: Role, roles: dict[str, Role]) -> None:
    role = getattr(module, "role", inherited)
    own = getattr(module, "roles", {})
    roles.update((prefix + name, own.get(name, role)) for name, _ in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        _add_roles(child, f"{prefix}{name}.", role, roles)
