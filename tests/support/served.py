"""Models of a few thousand weights that leave as Hugging Face folders, from configurations of `tests.support.tiny`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.checkpoint.state import RankLayout, capture
from moe_dist.config.manifest import load_manifest
from moe_dist.config.split_files import data_digest
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routers.top_k import GroupGate
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.policies import expert_groups
from tests.support.causal_models import evaluated_model
from tests.support.imported import manager
from tests.support.tiny import IMAGE_IDS, tiny_config

GROUP: dict[str, Any] = {"num_experts": 4, "num_null": 3, "top_k": 3, "ffn_dim": 16, "modalities": ["text", "image"]}
ONE = {"model.moe.groups": {"all": GROUP}}  # one group, and null rows that are no copies


def saved_model(folder: Path, data: Path, changes: Mapping[str, Any], *, copies: bool = False) -> Transformer:
    """Saves a checkpoint of a model with random weights in `folder`, as a run on `data` would, and returns the model.

    Args:
        copies: Whether null rows of routers are copies of true rows, as at the start of a run.
    """
    config = tiny_config(data, folder, changes)
    model = evaluated_model(config)
    for module in model.modules() if copies else ():
        if isinstance(module, GroupGate):
            module.copy_true_rows()
    groups = expert_groups(config.model.moe)
    placement = ExpertPlacement(groups, (tuple(range(sum(group.num_experts for group in groups))),))
    values = {"config": config.model_dump(mode="json"), "data": data_digest(data, load_manifest(data))}
    manager(folder).save(3, capture(model, None, RankLayout(placement), values=values))  # pyright: ignore[reportArgumentType]
    return model


def theirs(folder: Path, **options: Any) -> nn.Module:
    """The model that transformers loads from an export."""
    import transformers

    options = {"dtype": torch.float32, "trust_remote_code": True, "output_loading_info": True, **options}
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(told.values()), told
    return model


def group_of(model: Transformer, tokens: Tensor) -> Tensor:
    several = len(model.moe_modules()[0].router.groups) > 1  # pyright: ignore
    return (tokens >= IMAGE_IDS[0]).long() if several else torch.zeros_like(tokens)


@torch.no_grad()
def logits(model: Transformer, tokens_BS: Tensor) -> Tensor:
    positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    return model(tokens_BS, positions, torch.zeros_like(tokens_BS), group_of(model, tokens_BS))[0]


@torch.no_grad()
def continued(model: Transformer, tokens_BS: Tensor, count: int, *, cached: bool) -> Tensor:
    """The prompts with `count` more tokens, each the likeliest: by our cache, or from the logits of the whole sequences."""
    cache, new = model.make_cache(tokens_BS.shape[0], tokens_BS.shape[1] + count), tokens_BS
    for _ in range(count):
        if cached:
            first = tokens_BS.shape[1] - new.shape[1]
            positions = torch.arange(first, tokens_BS.shape[1]).expand_as(new)
            found = model.forward_cached(new, positions, group_of(model, new), cache)
        else:
            found = logits(model, tokens_BS)
        new = found[:, -1:].argmax(-1)
        tokens_BS = torch.cat([tokens_BS, new], dim=1)
    return tokens_BS
