"""The estimated memory per rank agrees with states counted by hand, and with the activations that autograd keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.config.rank_balance_schema import RankBalanceSection
from moe_dist.config.schema import Config
from moe_dist.model.layers import token_losses
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.flops import parameters
from moe_dist.plan.memory import (
    RankMemory,
    checkpoint_bytes,
    folder_bytes,
    held_parameters,
    layer_bytes_per_token,
    rank_memory,
)
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.train.build.training import build_model
from moe_dist.train.router_tuning.tuning import freeze_all_but_routers
from tests.support.tiny import tiny_config

BASE: dict[str, Any] = {
    **{"model.hidden_dim": 64, "model.num_layers": 3, "model.vocab_size": 128, "model.dense_ffn_dim": 96},
    "model.moe": {
        "shared_ffn_dim": 32,
        "groups": {"text": {"num_experts": 5, "num_null": 3, "top_k": 3, "ffn_dim": 96}},
    },
    **{"train.global_batch": 64, "train.micro_batch": 4, "placement": {"policy": "interleaved"}},
    **{"parallel.ep": 1, "parallel.device": "auto", "parallel.precision": "fp32"},
}


def config(*, parallel: dict[str, Any] | None = None, tuned: tuple[int, ...] = (), **model: Any) -> Config:
    """Returns an fp32 run. With `tuned` only the routers of these layers are trained."""
    changes = BASE | {f"model.{key}": value for key, value in model.items()}
    changes |= {f"parallel.{key}": value for key, value in (parallel or {}).items()}
    if tuned:
        changes |= {"run.init_from": "x", "train.only": "routers", "router_tuning": {"data": "none", "layers": tuned}}
    return tiny_config(Path("none"), Path("runs"), changes)


LATENT: dict[str, Any] = {"attention": {"kind": "latent", "q_rank": 48, "kv_rank": 40, "value_dim": 24}, "num_kv_heads": 4,
                          "head_dim": 36, "rope_dim": 12}  # fmt: skip


def placed(cfg: Config, ranks: int = 1) -> ExpertPlacement:
    return make_placement(cfg.placement, expert_groups(cfg.model.moe), num_ranks=ranks, token_mix={})


def estimated(cfg: Config, ranks: int = 1, rows: float = 1.0, pairs: float = 1.0) -> RankMemory:
    return rank_memory(cfg, placed(cfg, ranks), rank=0, rows=rows, pairs=pairs)


def kept_by_autograd(cfg: Config, *tuned: int) -> tuple[int, float, float]:
    """Returns the bytes that the forward pass keeps besides the weights, and the rows and pairs per token. With `tuned`
    only these layers' routers are trained."""
    torch.manual_seed(0)
    model = build_model(cfg, placed(cfg), ep_rank=0, ep_group=None)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if tuned:
        freeze_all_but_routers(model, tuned)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch, length = cfg.train.micro_batch, cfg.data.seq_len
    tokens = torch.randint(cfg.model.vocab_size, (batch, length))
    zeros = torch.zeros(batch, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, reports = model(tokens, torch.arange(length).expand(batch, -1), zeros.int(), zeros)
        losses = token_losses(logits, tokens)
    del losses
    pairs = sum(report.sent.pairs for report in reports) / len(reports) / tokens.numel()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), min(1.0, pairs), pairs


@pytest.mark.parametrize("model", [{}, {"qk_norm": "full"}, {"qk_norm": "head"}, LATENT,
    {"moe": {"groups": {"text": {"num_experts": 4, "top_k": 3, "ffn_dim": 96, "num_identity": 2, "num_constant": 2}}}},
    {"moe": {"every": 2, "groups": {"text": {
    "num_experts": 4, "top_k": 2, "ffn_dim": 256}}}}])  # fmt: skip
def test_activations_are_what_autograd_keeps(model: dict[str, Any]) -> None:
    cfg = config(**model)
    kept, rows, pairs = kept_by_autograd(cfg)
    assert 0.75 < estimated(cfg, 1, rows, pairs).activations / kept < 1.25


def test_activations_on_a_cpu_are_known_within_a_twentieth() -> None:
    cfg = config(parallel={"device": "cpu"}, vocab_size=16)  # small, as the output's estimate includes a gradient
    kept, rows, pairs = kept_by_autograd(cfg)
    tokens = cfg.train.micro_batch * cfg.data.seq_len
    assert tokens * sum(layer_bytes_per_token(cfg, rows, pairs)) == pytest.approx(kept, rel=0.05)
    assert tokens * sum(layer_bytes_per_token(config(vocab_size=16), rows, pairs)) < 0.95 * kept


@pytest.mark.parametrize(("layers", "model"), [((2,), {}), ((1, 2), {}), ((0, 2), {}), ((0, 2), LATENT)], ids=str)
def test_router_tuning_keeps_the_layers_from_its_lowest_on_and_moments_of_its_routers(
    layers: tuple[int, ...], model: dict[str, Any]
) -> None:
    # The vocabulary is small, because the estimate of the output includes a gradient, which the forward pass does not keep.
    cfg = config(tuned=layers, vocab_size=16, **model)
    kept, rows, pairs = kept_by_autograd(cfg, *layers)
    memory = estimated(cfg, 1, rows, pairs)
    assert 0.75 < memory.activations / kept < 1.25
    routers, whole = len(layers) * 8 * 64, parameters(cfg.model).total
    assert (memory.parameters, memory.gradients, memory.optimizer) == (4 * whole, 4 * routers, 8 * routers)
    assert checkpoint_bytes(cfg) == 4 * whole + 8 * routers


def test_where_torch_may_replace_kernels_its_memory_is_planned() -> None:
    sure, torchs, either = (
        estimated(config(parallel={"device": "cuda", "kernels": kernels})).total
        for kernels in ({}, {"kind": "torch"}, {"fallback": True})
    )
    assert sure < torchs == either


def test_states_of_a_rank() -> None:
    cfg = config(parallel={"ep": 4})
    placement = placed(cfg, 4)
    whole = parameters(cfg.model)
    expert = whole.experts / 5
    dense = whole.total - whole.experts
    held = [held_parameters(cfg, placement, rank=rank) for rank in range(4)]
    assert held == [dense + count * expert for count in (2, 1, 1, 1)]  # five experts on four ranks
    sharded = config(parallel={"ep": 4, "data": "fsdp2", "edp": 2})
    assert held_parameters(sharded, placement, rank=0) == (dense - whole.router) / 8 + expert + whole.router
    memory = estimated(cfg, 4)
    assert (memory.parameters, memory.gradients, memory.optimizer) == (4 * held[0], 4 * held[0], 8 * held[0])
    # In each direction: micro-batches of 256 tokens from each of three other ranks.
    assert memory.exchange_bound == 2 * 3 * 256 * 64 * 4
    bounded = config(parallel={"ep": 4, "max_receive_rows": 100})
    assert estimated(bounded, 4).exchange_bound == (3 * 256 + 100) * 64 * 4


@pytest.mark.parametrize(("recompute", "layers"), [("none", 3), ("block", 1)])
def test_replicas_keep_the_weights_of_experts(recompute: str, layers: int) -> None:
    """With two replicas per rank and layer, the replicas' weights in all layers stay in memory from forward to
    backward. Their gradients stay in memory for only one layer."""
    plain = config(parallel={"ep": 2, "recompute": recompute})
    section = RankBalanceSection.model_validate({"replicating": {"slots": 2}})
    more = plain.model_copy(update={"rank_balance": section})
    one, two = (estimated(each, 2, pairs=2.0).total for each in (plain, more))
    assert two - one == 2 * (3 * 64 * 96) * (layers + 1) * 4


@pytest.mark.parametrize("shared", [False, True])
def test_adapters_of_experts_are_with_their_experts_and_all_others_on_all_ranks(shared: bool) -> None:
    lora = {"kind": "ffn_lora", "rank": 2, "alpha": 4.0, "shared": shared, "shared_expert": True}
    groups = {"text": {"num_experts": 6, "top_k": 2, "ffn_dim": 96}}
    moe = {"shared_ffn_dim": 32, "groups": groups, "experts": lora}
    each = 3 * 2 * (64 + 2 * 96 + 96 + 64)  # adapters of one expert (or shared by all), in three layers
    others = 3 * (3 * 2 * (64 + 32) + 4 * (64 + 64))  # adapters of the shared expert, and of q and o

    def memory(**parallel: Any) -> tuple[float, float]:
        cfg = config(parallel=parallel, moe=moe, attention_lora={"rank": 4, "alpha": 4.0, "targets": ["q"]})
        found = estimated(cfg, 2)
        frozen = held_parameters(cfg, placed(cfg, 2), rank=0) - found.gradients / 4
        plain = config(parallel=parallel, moe={**moe, "experts": {"kind": "ffn"}})
        assert frozen == pytest.approx(held_parameters(plain, placed(plain, 2), rank=0))
        return found.gradients / 4, found.optimizer / 8

    own, on_all = (0, each + others) if shared else (3 * each, others)
    assert memory(ep=2, edp=2) == (own + on_all, own + on_all)
    assert memory(ep=2, edp=2, data="fsdp2") == (own / 2 + on_all / 4, own / 2 + on_all / 4)


def test_a_folder_needs_room_for_one_more_checkpoint_than_it_keeps() -> None:
    """The oldest checkpoint is deleted only after the new one is complete."""
    run = config()
    assert folder_bytes(run) == (run.checkpoint.keep + 1) * round(checkpoint_bytes(run))
