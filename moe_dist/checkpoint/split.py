"""Splits a dense FFN into fine-grained experts (MoEfication, Zhang et al., arXiv 2110.01786, section 3.1, with consecutive
neurons). The FFN's hidden values are divided into n equal parts. Expert j has the j-th part: the rows of gate and up and
the columns of down that belong to the hidden values of this part. The sum of all experts' outputs is the output of the FFN.

Splits the same FFN that upcycling would copy (`upcycle.py`). Router rows are initialised to 0, see `config/split_rule.py`.
"""

from collections.abc import Mapping

from moe_dist.checkpoint.contents import Contents
from moe_dist.checkpoint.fits import fitting
from moe_dist.checkpoint.index import Cut, Source, listed
from moe_dist.checkpoint.state import TensorSpec
from moe_dist.checkpoint.upcycle import experts_by_layer, norms, nothing, source_of
from moe_dist.errors import ConfigError
from moe_dist.placement.parameter_names import EXPERT_NAME

HIDDEN_DIM = {"gate": 0, "up": 0, "down": 1}  # the dim of each weight that runs over the hidden values


def fitting_or_split(contents: Contents, specs: Mapping[str, TensorSpec]) -> dict[str, Source]:
    """Maps each parameter that is loaded to its name in the checkpoint, or to a part of the checkpoint's FFN; equal on all
    ranks.

    Raises:
        ConfigError: a layer has no FFN to split, or the experts' widths do not add up to the FFN's width.
    """
    index = contents.index
    there, here = experts_by_layer(index.tensors), experts_by_layer(specs)
    sources: dict[str, Source] = {**fitting(contents, specs), **norms(index, specs)}
    problems: dict[str, None] = {}  # the keys serve as an ordered set
    for name, spec in specs.items():
        if (expert := EXPERT_NAME.fullmatch(name)) is None:
            continue
        layer, group, dim = expert["layer"], expert["group"], HIDDEN_DIM[expert["tensor"]]
        num_experts, width = len(here[layer][group]), spec.shape[dim]
        source = source_of(expert, index, there[layer], here[layer][group])
        if source is None or len(there[layer].get(group, ())) > 1:
            problems[f"{layer}.moe.experts.{group}: {nothing(num_experts, group, there[layer])}"] = None
            continue
        stored = index.tensors[source].shape
        if num_experts * width != stored[dim] or spec.shape[1 - dim] != stored[1 - dim]:
            problems[_unfit(group, num_experts, width, stored[dim], source)] = None
        sources[name] = Cut(source, dim, int(expert["expert"]) * width)
    if problems:
        raise ConfigError(listed(f"run.init_rules: split cannot split the FFNs of {contents.folder}", list(problems)))
    return sources


def _unfit(group: str, num_experts: int, width: int, whole: int, source: str) -> str:
    key = f"model.moe.groups.{group}"
    divisors = [n for n in range(1, whole + 1) if whole % n == 0]
    fix = (
        f"take ffn_dim={whole // num_experts}"
        if whole % num_experts == 0
        else f"take num_experts={min(divisors, key=lambda n: abs(n - num_experts))}, or another divisor of {whole}"
    )
    return (
        f"{key}: num_experts={num_experts} x ffn_dim={width} must be the width {whole} of {source}, with the same "
        f"hidden_dim; {fix}"
    )
