"""Selection biases of families' routers, such as DeepSeek-V3's `e_score_correction_bias`, for controllers."""

from torch import Tensor, nn

from moe_dist.errors import ConfigError
from moe_dist.hf.host.family import GUIDE
from moe_dist.hf.host.model import HostedModel
from moe_dist.placement.parameter_names import group_module


def share_biases(model: HostedModel) -> None:
    """Makes the family's selection biases [E] those of this project's routers, which controllers change in place. They are
    the one saved buffer of this shape in each router, or in the block that has the router. Raises ConfigError if there is
    not one. Must be called when the buffers have memory."""
    layers = {layer.name: layer for layer in model.moe_modules()}
    for bank in model.banks:
        num_experts = len(bank.ids)
        block = model.family.get_submodule(bank.router.rpartition(".")[0])
        found = [
            each for module in (model.family.get_submodule(bank.router), block) for each in _saved(module, num_experts)
        ]
        if len(found) != 1:
            raise ConfigError(
                f"model.moe.balance: controllers change the selection bias of a family's router, but {bank.router} has "
                f"{len(found)} saved buffers of {num_experts} numbers, and not one; remove the controllers",
                see=GUIDE,
            )
        layers[f"layers.{bank.layer}"].router.get_submodule(group_module(bank.group)).register_buffer("bias", found[0])


def _saved(module: nn.Module, num_experts: int) -> list[Tensor]:
    buffers, others = dict(module.named_buffers(recurse=False)), module._non_persistent_buffers_set
    return [each for name, each in buffers.items() if tuple(each.shape) == (num_experts,) and name not in others]
