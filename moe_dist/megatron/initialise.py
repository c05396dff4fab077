"""Initial weights of our layer inside Megatron: its initialisers, drawn by logical name, so that every layout is equal."""

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
    """Sets the router's and the experts' weights from (seed, logical name); `down` by the output layers' initialiser.

    One expert's matrix at a time is drawn on the host in fp32, the same on every layout and device. Does nothing where
    Megatron is told not to initialise (`perform_initialization`).
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
                weight.copy_(_draw(logical, weight, initialiser, seed))


def _draw(name: str, like: Tensor, initialiser, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):  # the host's state only: Megatron keeps those of its devices
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn = torch.empty(like.shape, dtype=torch.float32, device="cpu")
        initialiser(drawn)
    return drawn
