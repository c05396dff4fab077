"""Initialises the experts of a model as copies of a checkpoint's FFNs: sparse upcycling (Komatsuzaki et al., arXiv
2212.05055). An FFN is dense or, as in MoMa (arXiv 2407.21770), the only expert in the group of a modality.

In each layer all experts of a group become copies of one FFN of the checkpoint, namely the first in this list that exists:

1. the only expert in the checkpoint's group with the same name as the model's group,
2. the layer's dense FFN (its norm is loaded into the norm of the MoE layer),
3. the only expert in the checkpoint's layer, in a group of any name.

If the group has as many experts in the checkpoint as in the model, each expert is loaded from the checkpoint's expert with
the same name. Router rows are not copied, because equal rows would give all copies of an FFN the same score.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from moe_dist.checkpoint.contents import Contents
from moe_dist.checkpoint.fits import fitting, misfit
from moe_dist.checkpoint.index import Index, listed
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, TensorSpec
from moe_dist.errors import ConfigError
from moe_dist.placement.parameter_names import EXPERT_NAME

_NORM = re.compile(r"(?P<layer>layers\.\d+)\.moe\.norm\.weight")


def fitting_or_upcycled(contents: Contents, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Maps each loaded parameter to its name in the checkpoint. Merges the results of `fitting` and `upcycled`."""
    return fitting(contents, specs) | upcycled(contents.folder, contents.index, specs)


def upcycled(folder: Path, index: Index, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Maps each parameter that copies a tensor with another name to that name. The result is equal on all ranks.

    Args:
        folder: Folder of the checkpoint, named in error messages.
        specs: The tensors of the model.

    Raises:
        ConfigError: the checkpoint has no tensor to copy for an expert or for the whole model, or a shape or dtype differs.
    """
    there, here = experts_by_layer(index.tensors), experts_by_layer(specs)
    sources = norms(index, specs)
    problems: dict[str, None] = {}  # the keys serve as an ordered set
    for name in specs:
        if expert := EXPERT_NAME.fullmatch(name):
            layer, group = expert["layer"], expert["group"]
            source = source_of(expert, index, there[layer], here[layer][group])
            if source is None:
                problems[f"{layer}.moe.experts.{group}: {nothing(len(here[layer][group]), group, there[layer])}"] = None
            else:
                sources[name] = source
    problems |= {
        f"{name}: {problem}": None
        for name, source in sources.items()
        if (problem := misfit(index.tensors[source], specs[name], source))
    }
    if problems:
        head = (
            f"run.init_rules: upcycle cannot initialise all experts from {folder}; use the checkpoint's widths "
            "(model.hidden_dim, model.moe.groups.*.ffn_dim) and groups"
        )
        raise ConfigError(listed(head, list(problems)))
    sources = {name: source for name, source in sources.items() if source != name}  # `fitting` handles equal names
    if not sources:
        raise ConfigError(
            f"run.init_rules: upcycle finds nothing to copy in {folder}: its groups have as many experts as the model's; "
            "remove this rule"
        )
    return sources


def norms(index: Index, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """If the checkpoint lacks the norm of an MoE layer, maps this norm to the norm of the checkpoint's dense FFN in the
    layer."""
    found = {name: f"{norm['layer']}.ffn.norm.weight" for name in specs if (norm := _NORM.fullmatch(name))}
    return {name: source for name, source in found.items() if name not in index.tensors and source in index.tensors}


def experts_by_layer(names: Mapping[str, object]) -> dict[str, dict[str, set[str]]]:
    """Parses the names of tensors. Maps layer and group to the indices of the group's experts in this layer."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if not name.startswith(OPTIMIZER_PREFIX) and (match := EXPERT_NAME.fullmatch(name)):
            found[match["layer"]][match["group"]].add(match["expert"])
    return found


def source_of(expert: re.Match[str], index: Index, groups: Mapping[str, set[str]], experts: set[str]) -> str | None:
    """Returns the name of the checkpoint's tensor to load into an expert's tensor; None if the checkpoint has no such
    tensor. `groups` has the checkpoint's experts in this layer, by group. `experts` has the model's experts in this
    expert's group."""
    layer, group, tensor = expert["layer"], expert["group"], expert["tensor"]
    if group in groups:
        if groups[group] == experts:
            return expert[0]
        return f"{layer}.moe.experts.{group}.0.{tensor}" if len(groups[group]) == 1 else None
    dense = f"{layer}.ffn.{tensor}.weight"
    if dense in index.tensors:
        return dense
    if len(groups) == 1 and len(next(iter(groups.values()))) == 1:
        return f"{layer}.moe.experts.{next(iter(groups))}.0.{tensor}"
    return None


def nothing(wanted: int, group: str, groups: Mapping[str, set[str]]) -> str:
    """Returns the reason why the checkpoint has no FFN to copy into the `wanted` experts of a group in a layer. `groups`
    has the checkpoint's experts in this layer."""
    if group in groups:
        return f"{wanted} experts in the model, {len(groups[group])} in the checkpoint; only a single expert can be copied"
    if groups:
        return f"the checkpoint lacks this group in this layer; it has {', '.join(sorted(groups))}"
    return "the checkpoint has neither experts nor a dense FFN in this layer"
