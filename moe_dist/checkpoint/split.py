"""Splits FFNs into finer experts (MoEfication, Zhang et al., arXiv 2110.01786, section 3.1, with consecutive neurons). The
hidden neurons of an FFN are divided into equal parts, and each part becomes one expert. This expert has those rows of gate
and up and those columns of down that belong to the part's neurons. The sum of the experts' outputs is the FFN's output.

The rule `split` divides the dense FFN that upcycling would copy (`upcycle.py`) among all n experts of a group. The router
rows start at 0, see `config/init_rules.py`. The rule `split_experts` divides each expert e of a trained mixture into m
experts with the indices m e to m e + m - 1. Their router rows are copies of expert e's row, see
`config/split_experts_rule.py`.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moe_dist.checkpoint.contents import Contents
from moe_dist.checkpoint.fingerprint import hexadecimal
from moe_dist.checkpoint.fits import DTYPES, fitting
from moe_dist.checkpoint.index import Cut, Source, listed
from moe_dist.checkpoint.state import TensorSpec
from moe_dist.checkpoint.storage import pieces_of, read_tensors
from moe_dist.checkpoint.upcycle import experts_by_layer, norms, nothing, source_of
from moe_dist.errors import ConfigError, DataError
from moe_dist.placement.parameter_names import EXPERT_NAME

HIDDEN_DIM = {"gate": 0, "up": 0, "down": 1}  # the dim of each weight that indexes the hidden neurons


def fitting_or_split(contents: Contents, specs: Mapping[str, TensorSpec]) -> dict[str, Source]:
    """Maps each parameter to be loaded to its name in the checkpoint, or to its part of an FFN in the checkpoint. The
    result is equal on all ranks. Raises ConfigError if a layer has no FFN to split, or its width is not the sum of the
    experts' widths."""
    index = contents.index
    there, here = experts_by_layer(index.tensors), experts_by_layer(specs)

    def part_of(expert: re.Match[str]) -> tuple[str, int, int] | str:
        layer, group = expert["layer"], expert["group"]
        experts = here[layer][group]
        source = source_of(expert, index, there[layer], experts)
        if source is None or len(there[layer].get(group, ())) > 1:
            return nothing(len(experts), group, there[layer])
        return source, int(expert["expert"]), len(experts)

    return {**fitting(contents, specs), **norms(index, specs), **_parts(contents, specs, "split", part_of)}


def fitting_or_split_experts(contents: Contents, specs: Mapping[str, TensorSpec]) -> dict[str, Source]:
    """Maps each parameter to be loaded to its name in the checkpoint, or to its part of a stored expert. Equal on all
    ranks. Raises ConfigError if the checkpoint has no experts to split, or the parts' widths do not add up to an expert's
    width."""
    there, here = experts_by_layer(contents.index.tensors), experts_by_layer(specs)

    def part_of(expert: re.Match[str]) -> tuple[str, int, int] | str:
        layer, group = expert["layer"], expert["group"]
        old, new = len(there[layer].get(group, ())), len(here[layer][group])
        if not old or new % old:
            return f"{new} experts in the model, {old} in the checkpoint"
        whole, part = divmod(int(expert["expert"]), new // old)
        return f"{layer}.moe.experts.{group}.{whole}.{expert['tensor']}", part, new // old

    return {**fitting(contents, specs), **_parts(contents, specs, "split_experts", part_of)}


def _parts(
    contents: Contents,
    specs: Mapping[str, TensorSpec],
    rule: str,
    part_of: Callable[[re.Match[str]], tuple[str, int, int] | str],
) -> dict[str, Source]:
    """Maps each tensor of an expert to its part of a stored tensor. `part_of` returns either an error text, or the stored
    tensor's name, the index of the part and the number of parts."""
    sources: dict[str, Source] = {}
    problems: dict[str, None] = {}  # the keys serve as an ordered set
    for name, spec in specs.items():
        if (expert := EXPERT_NAME.fullmatch(name)) is None:
            continue
        found, dim, group = part_of(expert), HIDDEN_DIM[expert["tensor"]], expert["group"]
        if isinstance(found, str):
            problems[f"{expert['layer']}.moe.experts.{group}: {found}"] = None
            continue
        source, part, parts = found
        stored, width = contents.index.tensors[source].shape, spec.shape[dim]
        if parts * width != stored[dim] or spec.shape[1 - dim] != stored[1 - dim]:
            whole = stored[dim]
            near = min((n for n in range(1, whole + 1) if whole % n == 0), key=lambda n: abs(n - parts))
            fix = f"take ffn_dim={whole // near}"
            if near != parts:
                fix = f"take num_experts for {near} parts, or for another divisor of {whole}"
            problem = (
                f"num_experts gives each FFN {parts} parts, and {parts} x ffn_dim={width} must be the width {whole} of "
                f"{source}, with the same hidden_dim"
            )
            problems[f"model.moe.groups.{group}: {problem}; {fix}"] = None
        sources[name] = Cut(source, dim, part * width)
    if problems:
        what = "experts" if rule == "split_experts" else "FFNs"
        raise ConfigError(listed(f"run.init_rules: {rule} cannot split the {what} of {contents.folder}", list(problems)))
    return sources


def stored_tensors(contents: Contents, names: list[str]) -> dict[str, Tensor]:
    """Reads the tensors `names` of a checkpoint, each as a whole. Omits names that the checkpoint lacks. Raises DataError
    if a file or tensor is damaged."""
    entries = {name: entry for name in names if (entry := contents.index.tensors.get(name)) is not None}
    found = {name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype]) for name, entry in entries.items()}
    read_tensors(contents, found)
    for name, piece in pieces_of(found).items():
        if hexadecimal(piece.fingerprint()) != entries[name].fingerprint:
            raise DataError(f"checkpoint {contents.folder}: {name} differs from what was saved")
    return found
