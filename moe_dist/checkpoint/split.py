"""Splits FFNs into finer experts (MoEfication, Zhang et al., arXiv 2110.01786, section 3.1, with consecutive neurons). The
hidden neurons of an FFN are divided into equal parts, and each part becomes one expert. The expert gets the rows of gate
and up and the columns of down that belong to the part's neurons. The sum of the experts' outputs is the FFN's output.

The rule `split` divides the dense FFN that upcycling would copy (`upcycle.py`) among all n experts of a group. The router
rows start at 0, see `config/init_rules.py`.
"""

from collections.abc import Mapping

from moe_dist.checkpoint.contents import Contents
from moe_dist.checkpoint.fits import fitting
from moe_dist.checkpoint.index import Cut, Source, listed
from moe_dist.checkpoint.state import TensorSpec
from moe_dist.checkpoint.upcycle import experts_by_layer, norms, nothing, source_of
from moe_dist.errors import ConfigError
from moe_dist.placement.parameter_names import EXPERT_NAME

HIDDEN_DIM = {"gate": 0, "up": 0, "down": 1}  # the dim of each weight that indexes the hidden neurons


def fitting_or_split(contents: Contents, specs: Mapping[str, TensorSpec]) -> dict[str, Source]:
    """Maps each parameter to be loaded to its name in the checkpoint, or to its part of an FFN in the checkpoint. The
    result is equal on all ranks. Raises ConfigError if a layer has no FFN to split, or if the FFN's width is not the sum of
    the experts' widths."""
    index = contents.index
    there, here = experts_by_layer(index.tensors), experts_by_layer(specs)
    sources: dict[str, Source] = {}
    problems: dict[str, None] = {}  # the keys serve as an ordered set
    for name, spec in specs.items():
        if (expert := EXPERT_NAME.fullmatch(name)) is None:
            continue
        layer, group, dim = expert["layer"], expert["group"], HIDDEN_DIM[expert["tensor"]]
        experts = here[layer][group]
        source, part, parts = source_of(expert, index, there[layer], experts), int(expert["expert"]), len(experts)
        if source is None or len(there[layer].get(group, ())) > 1:
            problems[f"{layer}.moe.experts.{group}: {nothing(parts, group, there[layer])}"] = None
            continue
        stored, width = index.tensors[source].shape, spec.shape[dim]
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
        raise ConfigError(listed(f"run.init_rules: split cannot split the FFNs of {contents.folder}", list(problems)))
    return {**fitting(contents, specs), **norms(index, specs), **sources}
