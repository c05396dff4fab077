"""Splits each expert of a trained mixture into m finer experts, as `split.py` splits a dense FFN. The hidden values of the
checkpoint's expert e are divided into m equal parts, and expert m e + i of the model has the i-th part. The router row of
expert m e + i is a copy of expert e's row, see `config/split_experts_rule.py`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_dist.checkpoint.contents import Contents
from moe_dist.checkpoint.fingerprint import hexadecimal
from moe_dist.checkpoint.fits import DTYPES, fitting
from moe_dist.checkpoint.index import Cut, Source, listed
from moe_dist.checkpoint.split import HIDDEN_DIM
from moe_dist.checkpoint.state import TensorSpec
from moe_dist.checkpoint.storage import pieces_of, read_tensors
from moe_dist.checkpoint.upcycle import experts_by_layer
from moe_dist.errors import ConfigError, DataError
from moe_dist.placement.parameter_names import EXPERT_NAME


def fitting_or_split_experts(contents: Contents, specs: Mapping[str, TensorSpec]) -> dict[str, Source]:
    """Maps each parameter that is loaded to its name in the checkpoint, or to a part of a stored expert; equal on all
    ranks.

    Raises:
        ConfigError: the checkpoint has no experts to split, or the widths of the parts do not add up to an expert's width.
    """
    index = contents.index
    there, here = experts_by_layer(index.tensors), experts_by_layer(specs)
    sources: dict[str, Source] = {**fitting(contents, specs)}
    problems: dict[str, None] = {}  # the keys serve as an ordered set
    for name, spec in specs.items():
        if (expert := EXPERT_NAME.fullmatch(name)) is None:
            continue
        layer, group, dim = expert["layer"], expert["group"], HIDDEN_DIM[expert["tensor"]]
        old, new = len(there[layer].get(group, ())), len(here[layer][group])
        if not old or new % old:
            problems[f"{layer}.moe.experts.{group}: {new} experts in the model, {old} in the checkpoint"] = None
            continue
        parts, width = new // old, spec.shape[dim]
        whole, part = divmod(int(expert["expert"]), parts)
        source = f"{layer}.moe.experts.{group}.{whole}.{expert['tensor']}"
        stored = index.tensors[source].shape
        if parts * width != stored[dim] or spec.shape[1 - dim] != stored[1 - dim]:
            problems[
                f"model.moe.groups.{group}: {parts} parts x ffn_dim={width} must be the width {stored[dim]} of {source}, "
                "with the same hidden_dim; change num_experts or ffn_dim"
            ] = None
        sources[name] = Cut(source, dim, part * width)
    if problems:
        raise ConfigError(
            listed(f"run.init_rules: split_experts cannot split the experts of {contents.folder}", list(problems))
        )
    return sources


def stored_tensors(contents: Contents, names: list[str]) -> dict[str, Tensor]:
    """Returns whole tensors of a checkpoint, by name. Omits names that the checkpoint lacks.

    Raises:
        DataError: a file or a tensor is damaged.
    """
    entries = {name: entry for name in names if (entry := contents.index.tensors.get(name)) is not None}
    found = {name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype]) for name, entry in entries.items()}
    read_tensors(contents, found)
    for name, piece in pieces_of(found).items():
        if hexadecimal(piece.fingerprint()) != entries[name].fingerprint:
            raise DataError(f"checkpoint {contents.folder}: {name} differs from what was saved")
    return found
