"""Copies the router rows of split experts to the finer experts made from each split expert."""

from pathlib import Path

import torch

from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.split import stored_tensors
from moe_dist.model.transformer import Transformer
from moe_dist.placement.parameter_names import Role, logical_name, role_of_name


@torch.no_grad()
def split_routers(model: Transformer, path: Path, *, divides_bias: bool) -> int:
    """Fills a model's router rows and selection biases from a checkpoint with fewer experts. A model with m times as many
    experts gets each router row and bias m times in succession. Returns the number of filled router rows. Every rank reads
    the checkpoint.

    Args:
        path: A path for `find_checkpoint`.
        divides_bias: Whether to divide biases by m: true for biases that are added to probabilities, which are m times
            smaller for m times as many experts.

    Raises:
        DataError: a file or a tensor is damaged.
    """
    own = {logical_name(key): tensor for key, tensor in model.state_dict(keep_vars=True).items()}
    own = {name: tensor for name, tensor in own.items() if role_of_name(name) is Role.ROUTER}
    rows = 0
    for name, stored in stored_tensors(open_checkpoint(find_checkpoint(path)), list(own)).items():
        times = own[name].shape[0] // stored.shape[0]
        is_bias = name.endswith(".bias")
        own[name].copy_(stored.repeat_interleave(times, dim=0) / (times if is_bias and divides_bias else 1))
        rows += own[name].shape[0] if own[name].ndim == 2 else 0
    return rows
