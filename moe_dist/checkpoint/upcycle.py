"""Sparse upcycling: initialises the experts of a model from a dense checkpoint, by names and shapes (Komatsuzaki et al.,
arXiv 2212.05055). MoMa (arXiv 2407.21770) starts from a model with one expert per modality.

In each layer the experts of a group are copies of the first source below that the checkpoint contains:

1. the only expert of the group with the same name,
2. the layer's dense FFN, whose norm is loaded into the norm of the MoE layer,
3. the only expert of the layer's only group, whatever its name.

If the group has the same number of experts in the checkpoint, each expert is loaded by its own name. Router rows are not
copied: with equal rows the router could not distinguish the new experts.
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
from moe_dist.placement.roles import EXPERT_NAME

_NORM = re.compile(r"(?P<layer>layers\.\d+)\.moe\.norm\.weight")


def fitting_or_upcycled(contents: Contents, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The sources of `fitting` and `upcycled` together."""
    return fitting(contents, specs) | upcycled(contents.folder, contents.index, specs)


def upcycled(folder: Path, index: Index, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Maps each parameter whose source has another name to the source; equal on all ranks.

    Args:
        folder: Folder of the checkpoint, named in error messages.
        specs: The tensors of the model.

    Raises:
        ConfigError: an expert has no source, a source has another shape or dtype, or there is nothing to copy.
    """
    there, here = _experts_by_layer(index.tensors), _experts_by_layer(specs)
    sources: dict[str, str] = {}
    problems: dict[str, None] = {}  # ordered, without repetitions
    for name in specs:
        if norm := _NORM.fullmatch(name):
            source = f"{norm['layer']}.ffn.norm.weight"
            if name not in index.tensors and source in index.tensors:
                sources[name] = source
        elif expert := EXPERT_NAME.fullmatch(name):
            layer, group = expert["layer"], expert["group"]
            source = _source_of(expert, index, there[layer], here[layer][group])
            if source is None:
                problems[f"{layer}.moe.experts.{group}: {_nothing(len(here[layer][group]), group, there[layer])}"] = None
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
    sources = {name: source for name, source in sources.items() if source != name}  # `fitting` returns equal names
    if not sources:
        raise ConfigError(
            f"run.init_rules: upcycle finds nothing to copy in {folder}: its groups have as many experts as the model's; "
            "remove this rule"
        )
    return sources


def _experts_by_layer(names: Mapping[str, object]) -> dict[str, dict[str, set[str]]]:
    """Experts of each layer and group, by the names of their tensors."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if not name.startswith(OPTIMIZER_PREFIX) and (match := EXPERT_NAME.fullmatch(name)):
            found[match["layer"]][match["group"]].add(match["expert"])
    return found


def _source_of(expert: re.Match[str], index: Index, groups: Mapping[str, set[str]], experts: set[str]) -> str | None:
    """The source of an expert's tensor, None without a source. If the group has the same number of experts in the
    checkpoint, the source is the tensor of the same name."""
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


def _nothing(wanted: int, group: str, groups: Mapping[str, set[str]]) -> str:
    """The reason why `wanted` experts of a group have no source in a layer. `groups` has the experts that the checkpoint
    contains in that layer."""
    if group in groups:
        return f"{wanted} experts in the model, {len(groups[group])} in the checkpoint; only a single expert can be copied"
    if groups:
        return f"the checkpoint lacks this group in this layer; it has {', '.join(sorted(groups))}"
    return "the checkpoint has neither experts nor a dense FFN in this layer"
