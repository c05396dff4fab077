"""Initial weights inside Megatron: its initialisers, seeded by logical name, so that every layout gets equal weights."""

import hashlib

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_dist.moe.layer import MoELayer
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.placement.roles import group_module, named_parameters


@torch.no_grad()
def initialise_layer(
    moe: MoELayer, placement: ExpertPlacement, config: TransformerConfig, *, ep_rank: int, layer: int, seed: int
) -> None:
    """Initialises router and experts from (seed, logical name); `down` uses the initialiser of output layers.

    Draws one expert's matrix at a time on the host in fp32, so it is equal for every layout and device. Does nothing if
    `perform_initialization` is off.
    """
    if not config.perform_initialization:
        return
    prefix = f"layers.{layer}"
    for _, name, _, weight in named_parameters(moe.router):
        weight.copy_(_draw(f"{prefix}.router.{name}", weight, config.init_method, seed))
    for group in placement.groups:
        local = placement.local_experts(ep_rank, group)
        for name, stack in moe.experts.get_submodule(group_module(group.name)).named_parameters():
            initialiser = config.output_layer_init_method if name == "down" else config.init_method
            for weight, expert in zip(stack, local, strict=True):
                logical = f"{prefix}.experts.{group.name}.{expert - group.first_expert}.{name}"
                weight.copy_(_draw(logical, weight, initialiser, seed))  # casts to the parameter's dtype


def _draw(name: str, like: Tensor, initialiser, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):  # host generator only: Megatron manages those of the devices
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn = torch.empty(like.shape, dtype=torch.float32, device="cpu")
        initialiser(drawn)
    return drawn
