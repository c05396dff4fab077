"""Models of a few thousand weights in configurations of `tests.support.tiny`, exported as Hugging Face folders."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.checkpoint.state import RankLayout, capture
from moe_dist.formats.manifest import load_manifest
from moe_dist.formats.split_files import data_digest
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routers.top_k import GroupGate
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.policies import expert_groups
from tests.support.agreement import Arrays, arrays
from tests.support.causal_models import evaluated_model
from tests.support.hf_families import gradients, under_our_names
from tests.support.imported import manager
from tests.support.tiny import IMAGE_IDS, tiny_config

GROUP: dict[str, Any] = {"num_experts": 4, "num_null": 3, "top_k": 3, "ffn_dim": 16, "modalities": ["text", "image"]}
ONE = {"model.moe.groups": {"all": GROUP}}  # one group; its null rows are not copies


def one_rank_placement(groups: Sequence[ExpertGroup]) -> ExpertPlacement:
    return ExpertPlacement(tuple(groups), (tuple(range(sum(group.num_experts for group in groups))),))


def saved_model(folder: Path, data: Path, changes: Mapping[str, Any], *, copies: bool = False) -> Transformer:
    """Saves a checkpoint of a model with random weights in `folder`, as a run on `data` would do. Returns the model.

    Args:
        copies: Whether null rows of routers copy true rows, as at the start of a run.
    """
    config = tiny_config(data, folder, changes)
    model = evaluated_model(config)
    for module in model.modules() if copies else ():
        if isinstance(module, GroupGate):
            module.copy_true_rows()
    placement = one_rank_placement(expert_groups(config.model.moe))
    values = {"config": config.model_dump(mode="json"), "data": data_digest(data, load_manifest(data))}
    manager(folder).save(3, capture(model, None, RankLayout(placement), values=values))  # pyright: ignore[reportArgumentType]
    return model


def theirs(folder: Path, **options: Any) -> nn.Module:
    """Returns the model that transformers loads from an exported folder."""
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


def next_token_loss(logits_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())


def our_gradients(model: Transformer, tokens_BS: Tensor) -> Arrays:
    """Returns the gradients of the next-token loss in evaluation mode by logical name, with 0 for unused parameters."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    found = model(tokens_BS, positions, torch.zeros_like(tokens_BS), group_of(model, tokens_BS))[0]
    next_token_loss(found, tokens_BS).backward()
    return arrays(gradients(model, one_rank_placement(model.moe_modules()[0].router.groups), 0))  # pyright: ignore


def their_gradients(folder: Path, model: nn.Module, tokens_BS: Tensor, more: Mapping[str, Tensor] | None = None) -> Arrays:
    """Returns the gradients of the next-token loss of an exported model under our names, with 0 for buffers.

    Args:
        more: Further tensors with gradients, which are not parameters of the model.
    """
    next_token_loss(model(tokens_BS).logits, tokens_BS).backward()
    trained = dict(model.named_parameters()) | dict(more or {})
    named = {name: tensor.grad for name, tensor in trained.items() if tensor.grad is not None}
    return under_our_names(named, json.loads((folder / "config.json").read_text()))


@torch.no_grad()
def continued(model: Transformer, tokens_BS: Tensor, count: int, *, cached: bool) -> Tensor:
    """Returns the prompts with `count` more tokens, each the most likely one, with our cache or by whole forwards."""
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


def run_readme(folder: Path, monkeypatch: pytest.MonkeyPatch, *, lines: int) -> None:
    """Runs the Python lines in the README.md of an exported folder, in that folder."""
    (code,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) == lines
    monkeypatch.chdir(folder)
    exec(code, {})
