"""Converts weights of Hugging Face's mixture-of-experts blocks to our logical names.

Each family has a list of rules. A rule turns one of transformers' tensors into one or more of ours. Transformers stack
the experts and fuse gate and up, while we name each expert. The rules also convert gradients. They use only names and
shapes, and do not import transformers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.config.model_schema import ModelSection
from moe_dist.hf.forms import read_config
from moe_dist.hf.importing import run_config
from moe_dist.hf.names import slots
from moe_dist.hf.plan import ImportOptions, ImportPlan, changed_section
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.initialise import initialise, logical_expert_names
from moe_dist.placement.parameter_names import logical_name, named_parameters
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.train.build.training import build_model
from tests.support.agreement import Arrays, arrays, smallest_gap


def choice_gap(model: nn.Module, router_logits: Sequence[Tensor]) -> float:
    """Returns the smallest difference in score between a token's last chosen expert and the next expert, or between expert
    groups, over all layers of a transformers model."""
    config: Any = model.config
    biases = [bias for name, bias in model.state_dict().items() if name.endswith("e_score_correction_bias")]
    gaps = []
    for layer, scores in enumerate(router_logits):
        if biases:
            scores = (
                scores.sigmoid() if config.model_type in ("glm4_moe", "deepseek_v3") else scores.softmax(-1)
            ) + biases[layer].flatten()
        if getattr(config, "topk_group", 1) < getattr(config, "n_group", 1):
            parts = scores.unflatten(-1, (config.n_group, -1))
            sums = parts.sort(descending=True).values[..., :2].sum(-1)
            gaps.append(smallest_gap(sums, config.topk_group))
            last = sums.sort(descending=True).values[..., config.topk_group - 1, None]
            scores = torch.where((sums < last)[..., None], -torch.inf, parts).flatten(-2)
        gaps.append(smallest_gap(scores, config.num_experts_per_tok))
    return min(gaps)


def under_our_names(named: Mapping[str, Tensor], config: Mapping[str, Any]) -> Arrays:
    """Returns all tensors of a transformers model under our names. Tensors that the model lacks are zero.

    Args:
        config: The model's config.json.
    """
    family, plain, _ = read_config(config)
    found: dict[str, Tensor] = {}
    for slot in slots(changed_section(plain, family, ImportOptions()), family):
        ours = found[slot.name] = torch.zeros(slot.shape)
        places = [place for place in slot.places if place.name in named][:1] or slot.places[:1]
        boxes = ours.split(1) if slot.next_rows else [ours]
        for box, place in zip(boxes, (*places, *slot.next_rows), strict=bool(slot.places)):  # a dense FFN lacks a router
            if place.name in named:
                box.copy_(named[place.name].contiguous().as_strided(box.shape, place.strides or box.stride(), place.begin))
    return arrays(found)


@torch.no_grad()
def load(module: nn.Module, logical: Mapping[str, Tensor], placement: ExpertPlacement, ep_rank: int) -> None:
    """Fills every parameter and saved buffer of a model or MoE layer. `logical` must have every name."""
    for path, tensor in module.state_dict(keep_vars=True).items():
        name = logical_name(path)
        if "experts." in name:
            names = logical_expert_names(name, placement, ep_rank)
            for slot, each in enumerate(names):
                tensor[slot].copy_(logical[each])
        else:
            tensor.copy_(logical[name])


def gradients(module: nn.Module, placement: ExpertPlacement, ep_rank: int) -> dict[str, Tensor]:
    """Returns this rank's gradients under logical names, expert by expert."""
    named: dict[str, Tensor] = {}
    for _, name, _, parameter in named_parameters(module):
        if parameter.numel() == 0:
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        if "experts." in name:
            named |= zip(logical_expert_names(name, placement, ep_rank), parameter.grad, strict=True)
        else:
            named[name] = parameter.grad
    return named


def built(section: ModelSection, logical: Mapping[str, Tensor]) -> Transformer:
    """Returns a model on one rank with the given weights, in fp32 and evaluation mode."""
    config = run_config(ImportPlan(section, [], {}, {}), Path("model"), ImportOptions(), ".cache/data/none")
    placement = make_placement(config.placement, expert_groups(section.moe), num_ranks=1, token_mix={})
    with torch.device("meta"):
        model = build_model(config, placement, ep_rank=0, ep_group=None)
    initialise(model, placement, ep_rank=0, device=torch.device("cpu"), seed=9, std=0.5)
    load(model, logical, placement, 0)
    return model.eval()
