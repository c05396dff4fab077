"""On tiny random models in fp32, imported models have the logits of Hugging Face's own code, with and without a cache, and
the gradients of that code.

Each model goes through a user's steps: `save_pretrained`, import, checkpoint, load on EP 1, 2 and 4. Two tensors agree
if no entry differs by more than 1e-5 of the tensor's largest entry. Large and small gradients are thus compared to the
same number of digits.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import RankLayout, capture
from moe_dist.config.load import load_config
from moe_dist.hf.importing import import_model
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.initialise import initialise
from moe_dist.parallel.mesh import make_mesh
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.train.build.training import build_model
from tests.support.agreement import SMALLEST_GAP, Arrays, arrays, assert_agree, merged
from tests.support.cover import exhaustive, full
from tests.support.hf_families import choice_gap, gradients, under_our_names
from tests.support.tiny_hf import LENGTH, VOCAB, save, tiny_model
from tests.support.worlds import RankContext

SEQUENCES = 4
KINDS = (
    "mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "llama", "ernie4_5_moe", "glm4_moe", "deepseek_v3", "longcat_flash",
    "gpt_oss",
)  # fmt: skip
SCALED = ("mixtral sliding", "olmoe dynamic", "qwen3_moe sliding", "qwen2_moe sliding", "llama scaled")
PARTS = (5, 7)  # the cache is filled in two calls, with 5 and with 7 tokens
VARIANTS = ("qwen3_moe tied", "qwen2_moe dense", "llama biased", "olmoe biased", "ernie4_5_moe tied", "glm4_moe plain",
            "deepseek_v3 plain", "longcat_flash scaled", "gpt_oss plain")  # fmt: skip


def our_model(rank: RankContext, folder: Path, tokens: np.ndarray, recompute: str) -> tuple[Arrays, Arrays]:
    """Returns this rank's logits (in one call, and in two calls with a cache) and its gradients of a loss over all
    sequences."""
    overrides = [f"parallel.ep={rank.world_size}", "parallel.device=cpu", f"parallel.recompute={recompute}"]
    config = load_config(folder / "config.yaml", overrides)
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    placement = make_placement(config.placement, expert_groups(config.model.moe), num_ranks=rank.world_size, token_mix={})
    with torch.device("meta"):
        model = build_model(config, placement, ep_rank=mesh.ep_rank, ep_group=mesh.ep)
    initialise(model, placement, ep_rank=mesh.ep_rank, device=mesh.device, seed=9, std=0.5)
    layout = RankLayout(placement, mesh.rank, mesh.world_size, mesh.ep_rank, mesh.edp_rank, mesh.edp_size)
    manager = CheckpointManager(rank.folder, keep=1, lease_check=lambda: None, process_group=mesh.checkpoint)
    manager.load(find_checkpoint(folder), capture(model, None, layout))
    parallel = ParallelModel(model, mesh, "ddp")
    each = SEQUENCES // rank.world_size
    ids = torch.from_numpy(tokens[rank.rank * each :][:each])
    zeros = torch.zeros_like(ids)
    with parallel.micro_batch(last=True):
        logits, _ = parallel(ids, torch.arange(LENGTH).expand(each, -1), zeros, zeros)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        (losses / (SEQUENCES * (LENGTH - 1))).backward()
    parallel.reduce_gradients()
    numbers = {"logits": logits.detach().numpy(), "cached": cached_logits(model.eval(), ids).numpy()}
    return numbers, arrays(gradients(model, placement, mesh.ep_rank))


@torch.no_grad()
def cached_logits(model: Transformer, ids: Tensor) -> Tensor:
    cache, logits, begin = model.make_cache(*ids.shape), [], 0
    for part in ids.split(PARTS, dim=1):
        positions = torch.arange(begin, begin + part.shape[1]).expand_as(part)
        logits.append(model.forward_cached(part, positions, torch.zeros_like(part), cache))
        begin += part.shape[1]
    return torch.cat(logits, dim=1)


def their_numbers(model: nn.Module, tokens: np.ndarray) -> tuple[Arrays, dict[str, Tensor]]:
    """Returns the logits of transformers (in one call, and in two calls with a cache) and the gradients of the mean
    cross entropy."""
    import transformers

    ids = torch.from_numpy(tokens)
    if model.config.model_type == "llama":  # pyright: ignore[reportAttributeAccessIssue]
        out = model(ids, use_cache=False)
    else:
        out = model(ids, output_router_logits=True, use_cache=False)
        assert choice_gap(model, out.router_logits) > SMALLEST_GAP
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    cache = transformers.DynamicCache(config=model.config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        parts = [model(part, cache=cache, use_cache=True).logits for part in ids.split(PARTS, dim=1)]
    return {"logits": out.logits.detach().numpy(), "cached": torch.cat(parts, dim=1).numpy()}, named


# `make test` imports models with a softmax over all experts, sigmoids in groups, sinks and clamped experts, or a shortcut.
COVER = ("mixtral", "deepseek_v3", "gpt_oss", "longcat_flash")
# `make test-full` adds the other families and TELLING on 4 ranks, and models with scaled positions on 2 ranks.
TELLING = ("qwen3_moe tied", "qwen2_moe dense", "llama biased", "glm4_moe plain")
ONCE = [(kind, 4, "none") for kind in (*KINDS, *TELLING) if kind not in COVER] + [(kind, 2, "block") for kind in SCALED]
PRODUCT = [
    (kind, ep, mode) for kind in (*KINDS, *SCALED, *VARIANTS) for ep, mode in ((1, "none"), (2, "block"), (4, "none"))
]


@pytest.mark.parametrize(
    ("kind", "ep", "recompute"),
    [
        case if case in [(kind, 2, "block") for kind in COVER] else (full if case in ONCE else exhaustive)(*case)
        for case in PRODUCT
    ],
)
def test_logits_and_gradients_are_theirs(
    run_in_world: Callable[..., list[Any]], tmp_path: Path, kind: str, ep: int, recompute: str
) -> None:
    theirs = tiny_model(kind)
    import_model(save(theirs, tmp_path / "theirs"), tmp_path / "ours", shard_bytes=5000)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (SEQUENCES, LENGTH))
    numbers, gradient = their_numbers(theirs, tokens)
    ranks = run_in_world(ep, our_model, tmp_path / "ours", tokens, recompute)
    assert_agree({name: np.concatenate([each[name] for each, _ in ranks]) for name in numbers}, numbers)
    expected = under_our_names(gradient, theirs.config.to_dict())  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    trained = {name: value for name, value in expected.items() if not re.fullmatch(r".*\.router\..*\.bias", name)}
    assert_agree(merged([each for _, each in ranks]), trained)
