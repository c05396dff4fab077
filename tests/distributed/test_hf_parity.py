"""The numbers of Hugging Face's own modelling code, in fp32 on tiny random models: logits and every gradient, EP 1, 2, 4.

A tensor agrees where no entry differs by more than 1e-5 of its largest entry, so that gradients of any size are held to the
same number of digits. Weights are drawn with a standard deviation of 0.2, norms around 1: activations are of order 1. No
token's choice may hang on the last bits: the smallest gap at the k-th choice is asserted.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.build import build_model
from moe_dist.comm.all_to_all import Wire
from moe_dist.comm.traffic import Traffic
from moe_dist.config.schema import Config
from moe_dist.model.layers import SwiGLU
from moe_dist.moe.experts import Experts
from moe_dist.moe.free_experts import FreeExperts, has_free_experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.per_rank import PerRankDispatcher
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.parallel.mesh import make_mesh
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.placement.policies import expert_groups, make_placement
from tests.support.hf_families import DECODER, ERNIE_BLOCK, LONGCAT_BLOCK, gradients, load, model_section, to_logical
from tests.support.worlds import RankContext

Arrays = dict[str, np.ndarray]
BOUND = 1e-5
SMALLEST_GAP = 1e-5
SEQUENCES, LENGTH, VOCAB = 4, 12, 64
D = 32


def draw(module: nn.Module, seed: int) -> None:
    """Weights of order 1: what a fresh model starts with would leave logits and gradients near 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("norm.weight"):
                tensor.normal_(1.0, 0.1)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, 0.05)
            elif not name.endswith("inv_freq"):
                tensor.normal_(0.0, 0.2)


def assert_agree(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    worst = {name: float(np.abs(ours[name] - theirs[name]).max()) for name in theirs}
    off = {name: (each, float(np.abs(theirs[name]).max())) for name, each in worst.items()}
    assert not {name: pair for name, pair in off.items() if pair[0] > BOUND * pair[1]}


def smallest_gap(scores_TC: Tensor, top_k: int) -> float:
    best = scores_TC.detach().sort(-1, descending=True).values
    return float((best[:, top_k - 1] - best[:, top_k]).min())


def arrays(named: Mapping[str, Tensor]) -> Arrays:
    return {name: tensor.detach().numpy().copy() for name, tensor in named.items()}


def merged(ranks: Sequence[Arrays]) -> Arrays:
    """All ranks' gradients; copies that several ranks hold are the same."""
    together: Arrays = {}
    for rank in ranks:
        for name, value in rank.items():
            np.testing.assert_array_equal(together.setdefault(name, value), value)
    return together


# --- whole models


def their_model(family: str) -> nn.Module:
    """A tiny model of the family, drawn."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": D,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    sparse = {"num_experts": 8, "num_experts_per_tok": 3}
    qwen = {**shape, **sparse, "head_dim": 16, "moe_intermediate_size": 24, "intermediate_size": 20}
    config = {
        "mixtral": lambda: transformers.MixtralConfig(
            **shape, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2
        ),
        "olmoe": lambda: transformers.OlmoeConfig(**shape, **sparse, intermediate_size=24),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**qwen, norm_topk_prob=True),
        "qwen3_moe tied": lambda: transformers.Qwen3MoeConfig(**qwen, norm_topk_prob=False, tie_word_embeddings=True),
    }[family]()
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    draw(model, seed=1)
    return model


def their_numbers(model: nn.Module, tokens: np.ndarray) -> tuple[Arrays, dict[str, Tensor]]:
    """Logits, and each parameter's gradient of the mean cross entropy of the next token."""
    ids = torch.from_numpy(tokens)
    out = model(ids, output_router_logits=True, use_cache=False)
    top_k = model.config.num_experts_per_tok  # pyright: ignore[reportAttributeAccessIssue]
    assert min(smallest_gap(logits, top_k) for logits in out.router_logits) > SMALLEST_GAP
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach().numpy()}, named


def config_of(section: dict[str, Any], ep: int, recompute: str) -> Config:
    values = {
        "run": {"name": "parity"},
        "model": section,
        "data": {"path": "none", "seq_len": LENGTH},
        "train": {"steps": 1, "global_batch": SEQUENCES, "micro_batch": SEQUENCES // ep},
        "optimizer": {"lr": 1e-3},
        "parallel": {"ep": ep, "recompute": recompute},
        "evaluation": {"every": 1},
    }
    return Config.model_validate_json(json.dumps(values))


def our_model(
    rank: RankContext, section: dict[str, Any], weights: Arrays, tokens: np.ndarray, recompute: str
) -> tuple[np.ndarray, Arrays]:
    """Body of a standing world: logits of this rank's sequences, and its gradients of the same loss over all of them."""
    config = config_of(section, rank.world_size, recompute)
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=60.0)
    placement = make_placement(config.placement, expert_groups(config.model.moe), num_ranks=rank.world_size, token_mix={})
    model = build_model(config, placement, ep_rank=mesh.ep_rank, ep_group=mesh.ep)
    load(model, {name: torch.from_numpy(value) for name, value in weights.items()}, placement, mesh.ep_rank)
    parallel = ParallelModel(model, mesh, "ddp")
    each = SEQUENCES // rank.world_size
    ids = torch.from_numpy(tokens[rank.rank * each :][:each])
    zeros = torch.zeros_like(ids)
    with parallel.micro_batch(last=True):
        logits, reports = parallel(ids, torch.arange(LENGTH).expand(each, -1), zeros, zeros)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        (losses / (SEQUENCES * (LENGTH - 1))).backward()
    assert all(int(report.sums.dropped_E.sum()) == 0 for report in reports)
    parallel.reduce_gradients()
    return logits.detach().numpy(), arrays(gradients(model, placement, mesh.ep_rank))


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "qwen3_moe tied"])
def test_whole_models(run_in_world: Callable[..., list[Any]], family: str, ep: int, recompute: str) -> None:
    theirs = their_model(family)
    section = model_section(theirs.config.to_dict())  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    groups = expert_groups(config_of(section, 1, "none").model.moe)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (SEQUENCES, LENGTH))
    numbers, gradient = their_numbers(theirs, tokens)
    weights = arrays(to_logical(dict(theirs.named_parameters()), DECODER, groups))
    ranks = run_in_world(ep, our_model, section, weights, tokens, recompute)
    assert_agree({"logits": np.concatenate([logits for logits, _ in ranks])}, numbers)
    assert_agree(merged([each for _, each in ranks]), arrays(to_logical(gradient, DECODER, groups)))


# --- blocks


def our_block(
    rank: RankContext, groups: tuple[ExpertGroup, ...], options: dict[str, Any], weights: Arrays, batch: Arrays
) -> tuple[np.ndarray, np.ndarray, Arrays]:
    """Body of a standing world: output and input gradient of this rank's tokens, and its parameters' gradients."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=60.0)
    slots: list[list[int]] = [[] for _ in range(rank.world_size)]
    for expert in range(sum(group.num_experts for group in groups)):
        slots[expert % rank.world_size].append(expert)
    placement = ExpertPlacement(groups, tuple(map(tuple, slots)))
    shared_dim = options["shared_ffn_dim"]
    layer = MoELayer(
        norm=nn.Identity(),
        router=TopKRouter(D, groups, **options["router"]),
        experts=Experts(D, groups, [len(placement.local_experts(rank.rank, group)) for group in groups]),
        dispatcher=PerRankDispatcher(placement, Wire(mesh.ep, Traffic())),
        shared=SwiGLU(D, shared_dim) if shared_dim else None,
        free=FreeExperts(D, groups) if has_free_experts(groups) else None,
    )
    load(layer, {name: torch.from_numpy(value) for name, value in weights.items()}, placement, rank.rank)
    h_TD, group_T, direction = (
        torch.from_numpy(np.array_split(batch[name], rank.world_size)[rank.rank]) for name in ("h", "group", "direction")
    )
    h_TD.requires_grad_()
    y_TD, _ = layer(h_TD, group_T)
    (y_TD * direction).sum().backward()
    for name, parameter in layer.named_parameters():
        if not name.startswith("experts."):
            dist.all_reduce(parameter.grad)
    assert h_TD.grad is not None
    return y_TD.detach().numpy(), h_TD.grad.numpy(), arrays(gradients(layer, placement, rank.rank))


def longcat() -> tuple[nn.Module, tuple[ExpertGroup, ...], dict[str, Any]]:
    """LongCat-Flash: identity experts, a selection bias over all columns, weights of the plain softmax times a factor."""
    from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    config = LongcatFlashConfig(
        hidden_size=D,
        expert_ffn_hidden_size=24,
        n_routed_experts=6,
        zero_expert_num=3,
        moe_topk=4,
        routed_scaling_factor=1.5,
        num_layers=1,
    )
    group = ExpertGroup("all", 6, 0, 4, 24, 0, ("text",), num_identity=3)
    router = {"normalise": "none", "scale": 1.5, "selection_bias": True}
    return LongcatFlashMoE(config), (group,), {"router": router, "shared_ffn_dim": 0}


def ernie() -> tuple[nn.Module, tuple[ExpertGroup, ...], dict[str, Any]]:
    """Ernie 4.5 VL: text and image experts of different widths, each with a router and bias; shared experts beside them."""
    from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import Ernie4_5_VLMoeTextConfig
    from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeBlock

    config = Ernie4_5_VLMoeTextConfig(
        hidden_size=D, moe_intermediate_size=[24, 12], moe_num_experts=6, moe_k=3, moe_num_shared_experts=2
    )
    config._experts_implementation = "eager"
    groups = (ExpertGroup("text", 6, 0, 3, 24, 0, ("text",)), ExpertGroup("image", 6, 0, 3, 12, 6, ("image",)))
    return Ernie4_5_VLMoeMoeBlock(config), groups, {"router": {"selection_bias": True}, "shared_ffn_dim": 48}


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize(("make", "rules"), [(longcat, LONGCAT_BLOCK), (ernie, ERNIE_BLOCK)], ids=["longcat", "ernie"])
def test_blocks(run_in_world: Callable[..., list[Any]], make: Callable[[], Any], rules: Any, ep: int) -> None:
    theirs, groups, options = make()
    draw(theirs, seed=2)
    group_T = torch.from_numpy(np.random.default_rng(3).integers(0, len(groups), 40))
    h_TD = torch.randn(40, D).requires_grad_()
    direction = torch.randn(40, D)
    state = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    weights = to_logical(state, rules, groups)
    for index, group in enumerate(groups):
        kinds = [f"router.{group.name}.{kind}" for kind in ("true", "identity")]
        rows = torch.cat([weights[name] for name in kinds if name in weights])
        scores = (h_TD[group_T == index] @ rows.T).softmax(-1) + weights[f"router.{group.name}.bias"]
        assert smallest_gap(scores, group.top_k) > SMALLEST_GAP
    out = theirs(h_TD[None]) if len(groups) == 1 else theirs(h_TD[None], group_T[None])[0]
    (out[0] * direction).sum().backward()
    assert h_TD.grad is not None
    named = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    batch = {"h": h_TD.detach().numpy(), "group": group_T.numpy(), "direction": direction.numpy()}
    ranks = run_in_world(ep, our_block, groups, options, arrays(weights), batch)
    assert_agree(
        {"y": np.concatenate([y for y, _, _ in ranks]), "dh": np.concatenate([dh for _, dh, _ in ranks])},
        {"y": out[0].detach().numpy(), "dh": h_TD.grad.numpy()},
    )
    assert_agree(merged([each for _, _, each in ranks]), arrays(to_logical(named, rules, groups)))
