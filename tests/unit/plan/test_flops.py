"""The count of parameters and FLOPs, by hand, by published models, and by torch's own counter on the model that runs."""

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.config.model_schema import ModelSection
from moe_dist.config.schema import Config
from moe_dist.model.objective import Choices
from moe_dist.moe.routing.types import NO_REQUEST
from moe_dist.placement.placement import ExpertGroup
from moe_dist.plan.flops import (
    active_parameters,
    depth_router,
    expected_experts,
    flops_left_out,
    forward_flops,
    frozen_flops,
    parameters,
    training_flops,
)
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.train.build.training import build_model, freeze


def group(num_experts: int, num_null: int, top_k: int, ffn_dim: int, **others: int) -> dict[str, int]:
    return {"num_experts": num_experts, "num_null": num_null, "top_k": top_k, "ffn_dim": ffn_dim, **others}


def shape(*, moe: dict[str, Any] | None = None, **changes: Any) -> ModelSection:
    values: dict[str, Any] = {
        "hidden_dim": 8,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": 10,
        "max_seq_len": 16,
        "dense_ffn_dim": 20,
        "qk_norm": "full",
        "moe": {
            "first": 1,
            "shared_ffn_dim": 6,
            "groups": {"text": group(3, 1, 2, 5), "image": group(2, 0, 1, 7)},
            **(moe or {}),
        },
    }
    return ModelSection.model_validate_json(json.dumps({**values, **changes}))


def test_parameters_by_hand() -> None:
    parts = parameters(shape())
    assert parts.embedding == parts.output == 80
    assert parts.attention == 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 8 + 4)  # q, k and v, o, both norms
    assert parts.router == 2 * 8 * (3 + 1 + 2)
    assert parts.experts == 2 * (3 * 3 * 8 * 5 + 2 * 3 * 8 * 7)
    assert parts.shared == 2 * 3 * 8 * 6
    assert parts.dense_ffn == 3 * 8 * 20
    assert parts.norms == 8 * 7
    assert parameters(shape(tie_embeddings=True)).output == 0


def test_flops_by_hand() -> None:
    share = {"text": 0.75, "image": 0.25}
    forward = forward_flops(shape(), seq_len=16, experts_per_token={"text": 1.5, "image": 1.0}, token_share=share)
    assert forward.attention == 3 * (2 * (8 * 8 + 2 * 8 * 4 + 8 * 8) + 2 * 2 * 4 * 2 * 16)
    assert forward.router == 2 * 2 * 8 * 6
    assert forward.experts == 2 * (0.75 * 1.5 * 6 * 8 * 5 + 0.25 * 1.0 * 6 * 8 * 7)
    assert forward.shared == 2 * 6 * 8 * 6
    assert forward.dense_ffn == 6 * 8 * 20
    assert forward.output == 2 * 8 * 10
    assert training_flops(forward) == 3 * forward.total
    assert training_flops(forward, recompute="experts") == 3 * forward.total + forward.experts
    near = shape(sliding_window=5, sliding_layers=[0, 2])
    windowed = forward_flops(near, seq_len=16, experts_per_token={"text": 1.5, "image": 1.0}, token_share=share)
    assert forward.attention - windowed.attention == pytest.approx(2 * 2 * 2 * 4 * 2 * (16 - 5))
    block = forward.attention + forward.router + forward.experts + forward.shared
    assert training_flops(forward, recompute="block") == 3 * forward.total + block


def test_free_experts_by_hand() -> None:
    """Router rows of every column; of constant experts a vector and two gate rows each, of identity ones nothing."""
    model = shape(moe={"groups": {"text": group(3, 1, 2, 5, num_identity=2, num_constant=4)}})
    parts = parameters(model)
    assert parts.router == 2 * 8 * (3 + 1 + 2 + 4)
    assert parts.free == 2 * 4 * (8 + 2 * 8)
    forward = forward_flops(model, seq_len=16, experts_per_token={"text": 0.6}, token_share={"text": 1.0})
    assert forward.free == 2 * 4 * (2 * 2 * 8 + 2 * 8)
    assert expert_groups(model.moe)[0].expected_experts_per_token == 2 * 3 / 10


@pytest.mark.parametrize(("kind", "entries"), [("none", 0), ("head", 2 * 2), ("full", 8 + 4)])
def test_norms_of_queries_and_keys_by_hand(kind: str, entries: int) -> None:
    without = parameters(shape(qk_norm="none")).attention
    assert parameters(shape(qk_norm=kind)).attention == without + 3 * entries


LATENT: dict[str, Any] = {"attention": {"kind": "latent", "q_rank": 5, "kv_rank": 7, "value_dim": 6}, "num_kv_heads": 4,
                          "head_dim": 8, "rope_dim": 2, "qk_norm": "none"}  # fmt: skip


def test_latent_attention_by_hand() -> None:
    model = shape(**LATENT)
    matrices = 8 * 5 + 5 * 4 * 8 + 8 * (7 + 2) + 7 * 4 * (6 + 6) + 4 * 6 * 8
    assert parameters(model).attention == 3 * (matrices + 5 + 7)
    forward = forward_flops(
        model, seq_len=16, experts_per_token={"text": 1, "image": 1}, token_share={"text": 1, "image": 0}
    )
    assert forward.attention == 3 * (2 * matrices + 2 * 4 * (8 + 6) * 16)
    direct = shape(**LATENT | {"attention": {"kind": "latent", "kv_rank": 7, "value_dim": 6}})
    assert parameters(direct).attention == 3 * (matrices + 7 + 8 * 4 * 8 - (8 * 5 + 5 * 4 * 8))


def test_expected_experts_of_adamoe() -> None:
    assert expected_experts([ExpertGroup("text", 8, 8, 3, 1, 0, ("text",))]) == {"text": 1.5}


@pytest.mark.parametrize(
    ("published", "sizes", "experts"),
    [
        # OLMoE (arXiv 2409.02060): 6.9B and 1.3B. Mixtral of Experts (arXiv 2401.04088): 47B and 13B.
        ((6.9, 1.3), (2048, 16, 16, 16, 128, 50304), group(64, 0, 8, 1024)),
        ((46.7, 12.9), (4096, 32, 32, 8, 128, 32000), group(8, 0, 2, 14336)),
    ],
)
def test_published_sizes(published: tuple[float, float], sizes: tuple[int, ...], experts: dict[str, int]) -> None:
    dim, layers, heads, kv_heads, head_dim, vocab = sizes
    model = shape(
        moe={"first": 0, "shared_ffn_dim": 0, "groups": {"text": experts}},
        hidden_dim=dim, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, vocab_size=vocab,
        qk_norm="none",
    )  # fmt: skip
    per_token = expected_experts(expert_groups(model.moe))
    active = active_parameters(model, experts_per_token=per_token, token_share={"text": 1.0})
    assert round(parameters(model).total / 1e9, 1) == published[0]
    assert round(active.total / 1e9, 1) == published[1]


def config(*, free: bool = False, model: dict[str, Any] | None = None, **parallel: Any) -> Config:
    others = {"num_identity": 1, "num_constant": 2} if free else {}
    values = {
        "run": {"name": "flops"},
        "model": {
            "hidden_dim": 32,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "vocab_size": 48,
            "max_seq_len": 16,
            "qk_norm": "full",
            "dense_ffn_dim": 40,
            **(model or {}),
            "moe": {
                "first": 1,
                "shared_ffn_dim": 24,
                "groups": {"text": {"num_experts": 4, "num_null": 2, "top_k": 2, "ffn_dim": 16, **others}},
            },
        },
        "data": {"path": "none", "seq_len": 16},
        "train": {"steps": 1, "global_batch": 4, "micro_batch": 4},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"every": 1},
        "parallel": parallel,
    }
    return Config.model_validate_json(json.dumps(values))


def count_training(config: Config, batch: int = 4, choices: int = 0) -> tuple[int, float, int]:
    """FLOPs of forward and backward as torch counts them, mean experts a token, and tokens. With `choices` the loss is the
    cross entropy over so many words."""
    placement = make_placement(config.placement, expert_groups(config.model.moe), num_ranks=1, token_mix={})
    torch.manual_seed(0)
    model = build_model(config, placement, ep_rank=0, ep_group=None)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    freeze(model, config)
    length = config.data.seq_len
    tokens = torch.randint(config.model.vocab_size, (batch, length))
    zeros = torch.zeros(batch, length, dtype=torch.int64)
    # The math kernel's products are ordinary matrix products, which the counter sees on CPU.
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        of_choices = (NO_REQUEST, tokens, Choices(tokens[:, :choices])) if choices else ()
        logits, reports = model(tokens, torch.arange(length).expand(batch, -1), zeros.int(), zeros, *of_choices)
        logits.sum().backward()
    pairs = sum(report.sent.pairs for report in reports)
    return counter.get_total_flops(), pairs / len(reports) / tokens.numel(), tokens.numel()


@pytest.mark.parametrize("changes", [{}, {"free": True}, {"model": LATENT}], ids=["plain", "free", "latent"])
def test_agrees_with_torchs_counter(changes: dict[str, Any]) -> None:
    cfg = config(**changes)
    counted, experts, tokens = count_training(cfg)
    model = cfg.model
    forward = forward_flops(model, seq_len=cfg.data.seq_len, experts_per_token={"text": experts}, token_share={"text": 1.0})
    assert counted == pytest.approx(training_flops(forward) * tokens, rel=1e-3)


@pytest.mark.parametrize("causal", ["threshold", "auxiliary"])
def test_depths_agree_with_torchs_counter(causal: str) -> None:
    """One sequence, since slots of several sequences stand in one row, whose products the CPU's dense mask computes all.
    Not seen by the counter: scores (sums of products), and the auxiliary routers' backward, whose loss is not here.
    """
    cfg = config(model={"mixture_of_depths": {"first": 1, "every": 1, "capacity": 0.25, "causal": causal}})
    counted, experts, tokens = count_training(cfg, batch=1)
    assert experts < 0.6  # of all tokens, while those that are taken have 4 / 3
    model = cfg.model
    assert len(model.depth_layers) == 2
    sizes = {"experts_per_token": {"text": experts / 0.25}, "token_share": {"text": 1.0}}
    forward = forward_flops(model, seq_len=cfg.data.seq_len, **sizes)
    scores = 2 * cfg.model.hidden_dim
    unseen = 6 * scores + 4 * (depth_router(model) - scores)
    assert counted == pytest.approx((training_flops(forward) - unseen) * tokens, rel=1e-3)
    plain = config().model
    assert forward.attention < 0.5 * forward_flops(plain, seq_len=16, **sizes).attention


def test_depths_by_hand() -> None:
    share, experts = {"text": 0.75, "image": 0.25}, {"text": 1.5, "image": 1.0}
    plain = forward_flops(shape(), seq_len=16, experts_per_token=experts, token_share=share)
    some = shape(mixture_of_depths={"first": 1, "every": 1, "capacity": 0.25, "causal": "auxiliary"})
    forward = forward_flops(some, seq_len=16, experts_per_token=experts, token_share=share)
    projections, products = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8), 2 * 2 * 4 * 2 * 16
    assert forward.attention == 1.5 * projections + (1 + 2 / 16) * products
    assert forward.experts == plain.experts / 4
    assert forward.router == plain.router / 4 + 2 * 2 * (8 + 4 * 8 + 4)
    assert forward.output == plain.output
    assert parameters(some).total == parameters(shape()).total + 2 * (8 + 4 * 8 + 4)


def lora_config(**parallel: Any) -> Config:
    values = config(**parallel).model_dump(mode="json")
    values["run"] |= {"init_from": "x", "init_rules": ["adapt"]}
    values["train"]["only"] = "adapters"
    values["model"]["attention_lora"] = {"rank": 3, "alpha": 3.0, "targets": ["q", "o"]}
    values["model"]["moe"] |= {
        "shared_ffn_dim": 0,
        "experts": {"kind": "lora", "rank": 2, "alpha": 2.0, "targets": ["gate", "down"]},
        "router": {"kind": "top_k", "normalise": "none"},
    }
    return Config.model_validate_json(json.dumps(values))


def test_lora_by_hand() -> None:
    experts = {"kind": "lora", "rank": 2, "alpha": 2.0, "targets": ["gate", "up", "down"]}
    groups = {"text": group(3, 1, 1, 5), "image": group(2, 1, 1, 5)}
    router = {"kind": "top_k", "normalise": "none"}
    some = shape(
        moe={"groups": groups, "shared_ffn_dim": 0, "experts": experts, "router": router},
        attention_lora={"rank": 3, "alpha": 3.0, "targets": ["q", "k"]},
    )
    parts = parameters(some)
    assert (parts.experts, parts.shared) == (0, 2 * 3 * 8 * 5)
    attention = 3 * 3 * ((8 + 8) + (8 + 4))
    assert parts.adapters == 2 * 5 * 2 * 3 * (8 + 5) + attention
    share = {"text": 0.5, "image": 0.5}
    forward = forward_flops(some, seq_len=16, experts_per_token={"text": 0.5, "image": 1.0}, token_share=share)
    assert forward.adapters == 2 * (2 * 0.75 * 2 * 3 * (8 + 5) + attention)
    assert forward.shared == 2 * parts.shared
    frozen = frozen_flops(some, forward, seq_len=16)
    assert frozen == forward.shared + forward.dense_ffn + forward.output + 3 * 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8)
    assert training_flops(forward, frozen=frozen) == 3 * forward.total - frozen
    assert training_flops(forward, recompute="experts") == 3 * forward.total + forward.shared + forward.adapters


def test_a_shared_adapter_is_stored_once_and_multiplied_by_each_expert_of_a_token() -> None:
    groups = {"text": group(3, 1, 1, 5), "image": group(2, 1, 1, 5)}
    own, shared = (
        shape(moe={"groups": groups, "experts": {"kind": "ffn_lora", "rank": 2, "alpha": 2.0, "shared": shared}})
        for shared in (False, True)
    )
    of_one = 2 * 2 * (8 + 2 * 5 + 5 + 8)  # in two MoE layers
    assert (parameters(own).adapters, parameters(shared).adapters) == (5 * of_one, 2 * of_one)
    share = {"text": 0.5, "image": 0.5}
    for model in (own, shared):
        forward = forward_flops(model, seq_len=16, experts_per_token={"text": 2.0, "image": 1.0}, token_share=share)
        assert forward.adapters == 2 * 1.5 * of_one


def test_lora_agrees_with_torchs_counter() -> None:
    """The forward exactly; the whole up to what has no gradient below the first adapter, which is counted here by hand."""
    cfg = lora_config()
    counted, experts, tokens = count_training(cfg)
    model = cfg.model
    forward = forward_flops(model, seq_len=cfg.data.seq_len, experts_per_token={"text": experts}, token_share={"text": 1.0})
    frozen = frozen_flops(model, forward, seq_len=cfg.data.seq_len)
    below = (
        2 * (32 * 32 + 2 * 32 * 16) + 2 * 3 * 32
    )  # of layer 0: q, k, v and q's first matrix need no gradient of their input
    scores_of_keys = 2 * 32 * 16  # and k has no adapter, so the scores' gradient of the keys is not computed
    values = 2 * 32 * 16  # nor that of the values
    expected = training_flops(forward, frozen=frozen) - below - scores_of_keys - values
    assert counted == pytest.approx(expected * tokens, rel=1e-3)


def tuned_config(layers: list[int], objective: str = "tokens") -> Config:
    values = config().model_dump(mode="json")
    values["run"] |= {"init_from": "x"}
    values["train"]["only"] = "routers"
    values["router_tuning"] = {"data": "none", "layers": layers, "objective": objective}
    values["model"]["moe"]["groups"]["text"]["num_null"] = 0  # each layer takes as many experts as the other
    return Config.model_validate_json(json.dumps(values))


@pytest.mark.parametrize("layers", [[1], [2], [1, 2]], ids=str)
def test_router_tuning_agrees_with_torchs_counter(layers: list[int]) -> None:
    cfg = tuned_config(layers)
    counted, experts, tokens = count_training(cfg)
    model = cfg.model
    forward = forward_flops(model, seq_len=cfg.data.seq_len, experts_per_token={"text": experts}, token_share={"text": 1.0})
    expected = training_flops(
        forward,
        frozen=flops_left_out(cfg, forward),
    )
    assert counted == pytest.approx(expected * tokens, rel=1e-3)
    assert expected < 0.7 * training_flops(forward)


def test_choices_have_no_output_layer() -> None:
    cfg = tuned_config([1, 2], "choices")
    counted, experts, tokens = count_training(cfg, choices=2)
    model = cfg.model
    forward = forward_flops(model, seq_len=cfg.data.seq_len, experts_per_token={"text": experts}, token_share={"text": 1.0})
    expected = training_flops(forward, frozen=flops_left_out(cfg, forward))
    of_choices = 2 * 2 * 2 * model.hidden_dim  # logits of two words, forward and backward
    assert counted == pytest.approx((expected + of_choices) * tokens, rel=1e-3)


def test_a_gating_residual_by_hand() -> None:
    """A matrix over all columns of each group, in the second of two MoE layers alone."""
    share = {"text": 0.75, "image": 0.25}
    plain, residual = shape(), shape(moe={"router": {"kind": "gating_residual"}})
    assert parameters(residual).router - parameters(plain).router == 4 * 4 + 2 * 2
    taken = {"text": 1.5, "image": 1.0}
    of = {"seq_len": 16, "experts_per_token": taken, "token_share": share}
    assert forward_flops(residual, **of).router - forward_flops(plain, **of).router == 2 * (4 * 4 + 2 * 2)


def test_recompute_repeats_no_more_than_counted() -> None:
    plain, experts, tokens = count_training(config())
    model = config().model
    forward = forward_flops(model, seq_len=16, experts_per_token={"text": experts}, token_share={"text": 1.0})
    for recompute in ("experts", "block"):
        repeated = count_training(config(recompute=recompute))[0] - plain
        bound = (training_flops(forward, recompute=recompute) - training_flops(forward)) * tokens
        assert 0.5 * bound < repeated <= bound * 1.001, recompute
