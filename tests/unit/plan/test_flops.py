"""The counts of parameters and FLOPs agree with the built model and torch's counter, and with published models."""

import json
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.config.model_schema import ModelSection
from moe_dist.config.schema import Config
from moe_dist.model.objective import Choices
from moe_dist.moe.routing.types import NO_REQUEST
from moe_dist.placement.parameter_names import Role, named_parameters
from moe_dist.placement.placement import ExpertGroup
from moe_dist.plan.flops import (
    Parts,
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
from tests.support.layouts import FORMS, TEXT, Layout, config_of, placement_for
from tests.support.tiny import tiny_config


def group(num_experts: int, num_null: int, top_k: int, ffn_dim: int, **others: int) -> dict[str, int]:
    return {"num_experts": num_experts, "num_null": num_null, "top_k": top_k, "ffn_dim": ffn_dim, **others}


def shape(*, moe: dict[str, Any] | None = None, **changes: Any) -> ModelSection:
    values: dict[str, Any] = {
        "hidden_dim": 8, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 10, "max_seq_len": 16,
        "dense_ffn_dim": 20, "qk_norm": "full",
        "moe": {
            "first": 1,
            "shared_ffn_dim": 6,
            "groups": {"text": group(3, 1, 2, 5), "image": group(2, 0, 1, 7)},
            **(moe or {}),
        },
    }  # fmt: skip
    return ModelSection.model_validate_json(json.dumps({**values, **changes}))


LATENT: dict[str, Any] = {
    "model__attention": {"kind": "latent", "q_rank": 5, "kv_rank": 7, "value_dim": 6},
    **{"model__num_kv_heads": 4, "model__head_dim": 8, "model__rope_dim": 2, "model__qk_norm": "none"},
}
FREE = {"model__moe__groups": {"text": group(4, 2, 2, 16, num_identity=1, num_constant=2)}}
LAYOUTS = [
    *(Layout(), Layout(tied=True), Layout(free=True), Layout(limited=True), Layout(null_logit="single")),
    *(Layout(adaptive=kind) for kind in ("top_p", "relu", "threshold", "predicted_k")),
    *(Layout(lora="probability"), Layout(ffn_lora="each", attention_lora=True), Layout(ffn_lora="shared")),
    Layout(choice="rank", choice_causal="auxiliary", mixture_of_depths="rank", depth_causal="auxiliary"),
    *(Layout(form=form) for form in FORMS if form),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_kind_of_model_has_the_counted_parameters_and_forward_flops(layout: Layout) -> None:
    """torch's counter counts up to 0.1 % more, because it includes the rotation of queries and keys."""
    cfg = config_of(layout)
    torch.manual_seed(0)
    model = build_model(cfg, placement_for(layout), ep_rank=0, ep_group=None)
    found: Counter[Role] = Counter()
    for _, _, role, parameter in named_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
        found[role] += parameter.numel()
    parts = parameters(cfg.model)
    assert parts.embedding == found[Role.EMBEDDING]
    assert parts.router == found[Role.ROUTER] + found[Role.DEPTH_ROUTER] + found[Role.AUXILIARY_ROUTER]
    assert parts.experts == found[Role.EXPERT]
    assert parts.free == found[Role.ZERO_COMPUTATION]
    assert parts.adapters == found[Role.ADAPTER] + found[Role.EXPERT_ADAPTER]
    assert parts.total == sum(found.values())
    if layout.mixture_of_depths or layout.form in ("gpt_oss", "gpt_oss, adapted", "clamped experts, nulls"):
        return  # only the math kernel computes masked scores and sinks as products
    tokens = torch.randint(TEXT[1], (4, cfg.data.seq_len))
    zeros, positions = torch.zeros_like(tokens), torch.arange(cfg.data.seq_len).expand(4, -1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _, reports = model(tokens, positions, zeros.int(), zeros)
    experts = sum(report.sent.pairs for report in reports) / len(reports) / tokens.numel()
    taken, share = {"text": experts, "image": 0.0}, {"text": 1.0, "image": 0.0}
    forward = forward_flops(cfg.model, seq_len=cfg.data.seq_len, experts_per_token=taken, token_share=share)
    assert counter.get_total_flops() == pytest.approx(forward.total * tokens.numel(), rel=3e-3)


def test_a_window_bounds_the_scores_by_hand() -> None:
    sizes: dict[str, Any] = {"experts_per_token": {"text": 1.5, "image": 1.0}, "token_share": {"text": 0.75, "image": 0.25}}
    whole, windowed = (
        forward_flops(shape(**changes), seq_len=16, **sizes)
        for changes in ({}, {"sliding_window": 5, "sliding_layers": [0, 2]})
    )
    assert whole.attention - windowed.attention == pytest.approx(2 * 2 * 2 * 4 * 2 * (16 - 5))


def test_expected_experts_of_adamoe() -> None:
    assert expected_experts([ExpertGroup("text", 8, 8, 3, 1, 0, ("text",))]) == {"text": 1.5}
    others = shape(moe={"groups": {"text": group(3, 1, 2, 5, num_identity=2, num_constant=4)}})
    assert expert_groups(others.moe)[0].expected_experts_per_token == 2 * 3 / 10


BASE: dict[str, Any] = {
    **{"model.num_layers": 3, "model.vocab_size": 48, "model.max_seq_len": 16, "model.qk_norm": "full"},
    **{"model.dense_ffn_dim": 40, "model.moe.first": 1, "model.moe.shared_ffn_dim": 24},
    **{"model.moe.groups": {"text": group(4, 2, 2, 16)}, "placement": {"policy": "interleaved"}, "parallel.ep": 1},
    **{"data.seq_len": 16, "train.global_batch": 4, "train.micro_batch": 4},
}


def config(**changes: Any) -> Config:
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return tiny_config(Path("none"), Path("runs"), deepcopy({**BASE, **named}))


def count_training(config: Config, batch: int = 4, choices: int = 0) -> tuple[int, float, int]:
    """Returns torch's count of FLOPs in forward and backward, the mean number of experts per token, and the number of
    tokens. With `choices` the loss is the cross entropy over this many words."""
    placement = make_placement(config.placement, expert_groups(config.model.moe), num_ranks=1, token_mix={})
    torch.manual_seed(0)
    model = build_model(config, placement, ep_rank=0, ep_group=None)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    freeze(model, config)
    length = config.data.seq_len
    tokens = torch.randint(config.model.vocab_size, (batch, length))
    zeros = torch.zeros(batch, length, dtype=torch.int64)
    # The math kernel uses ordinary matrix products, which the counter sees on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        of_choices = (NO_REQUEST, tokens, Choices(tokens[:, :choices])) if choices else ()
        logits, reports = model(tokens, torch.arange(length).expand(batch, -1), zeros.int(), zeros, *of_choices)
        logits.sum().backward()
    pairs = sum(report.sent.pairs for report in reports)
    return counter.get_total_flops(), pairs / len(reports) / tokens.numel(), tokens.numel()


def forward_of(cfg: Config, experts: float) -> Parts:
    return forward_flops(
        cfg.model, seq_len=cfg.data.seq_len, experts_per_token={"text": experts}, token_share={"text": 1.0}
    )


@pytest.mark.parametrize("changes", [{}, FREE, LATENT], ids=["plain", "free", "latent"])
def test_agrees_with_torchs_counter(changes: dict[str, Any]) -> None:
    cfg = config(**changes)
    counted, experts, tokens = count_training(cfg)
    assert counted == pytest.approx(training_flops(forward_of(cfg, experts)) * tokens, rel=1e-3)


@pytest.mark.parametrize("causal", ["threshold", "auxiliary"])
def test_depths_agree_with_torchs_counter(causal: str) -> None:
    """Uses one sequence: slots of several sequences would form one row, and the CPU's dense mask computes all products of a
    row. The counter misses the router's scores, which are no matrix products, and the loss does not train the auxiliary
    routers."""
    cfg = config(model__mixture_of_depths={"first": 1, "every": 1, "capacity": 0.25, "causal": causal})
    counted, experts, tokens = count_training(cfg, batch=1)
    assert experts < 0.6  # mean over all tokens; a computed token takes 4 / 3 experts
    assert len(cfg.model.depth_layers) == 2
    forward = forward_of(cfg, experts / 0.25)
    scores = 2 * cfg.model.hidden_dim
    unseen = 6 * scores + 4 * (depth_router(cfg.model) - scores)
    assert counted == pytest.approx((training_flops(forward) - unseen) * tokens, rel=1e-3)
    assert forward.attention < 0.5 * forward_of(config(), experts / 0.25).attention


LORA: dict[str, Any] = {
    "run__init_from": "x",
    "run__init_rules": ["adapt"],
    "train__only": "adapters",
    "model__attention_lora": {"rank": 3, "alpha": 3.0, "targets": ["q", "o"]},
    "model__moe__shared_ffn_dim": 0,
    "model__moe__experts": {"kind": "lora", "rank": 2, "alpha": 2.0, "targets": ["gate", "down"]},
    "model__moe__router": {"kind": "top_k", "normalise": "none"},
}


def test_lora_agrees_with_torchs_counter() -> None:
    """The forward count agrees exactly. Our total also counts a backward pass below the first adapter. Autograd skips
    this part, so the test subtracts it."""
    cfg = config(**LORA)
    counted, experts, tokens = count_training(cfg)
    forward = forward_of(cfg, experts)
    frozen = frozen_flops(cfg.model, forward, seq_len=cfg.data.seq_len)
    below = 2 * (32 * 32 + 2 * 32 * 16) + 2 * 3 * 32  # in layer 0, q, k, v and q's first matrix need no input gradient
    scores_of_keys = 2 * 32 * 16  # k has no adapter, so the keys get no gradient from the scores
    values = 2 * 32 * 16  # the values get no gradient either
    expected = training_flops(forward, frozen=frozen) - below - scores_of_keys - values
    assert counted == pytest.approx(expected * tokens, rel=1e-3)


@pytest.mark.parametrize(
    ("layers", "choices"), [([1], 0), ([2], 0), ([1, 2], 0), ([1, 2], 2)], ids=["1", "2", "1 and 2", "choices"]
)
def test_router_tuning_agrees_with_torchs_counter(layers: list[int], choices: int) -> None:
    """With choices, forward and backward compute only the logits of two words instead of the whole output layer."""
    tuning = {"data": "none", "layers": layers, "objective": "choices" if choices else "tokens"}
    # Without null experts tokens take the same number of experts in both layers.
    tuned: dict[str, Any] = {"router_tuning": tuning, "model__moe__groups__text__num_null": 0}
    cfg = config(run__init_from="x", train__only="routers", **tuned)
    counted, experts, tokens = count_training(cfg, choices=choices)
    forward = forward_of(cfg, experts)
    expected = training_flops(forward, frozen=flops_left_out(cfg, forward))
    assert counted == pytest.approx((expected + 2 * 2 * choices * cfg.model.hidden_dim) * tokens, rel=1e-3)
    assert expected < 0.7 * training_flops(forward)


def test_recompute_repeats_no_more_than_counted() -> None:
    plain, experts, tokens = count_training(config())
    forward = forward_of(config(), experts)
    for recompute in ("experts", "block"):
        repeated = count_training(config(parallel__recompute=recompute))[0] - plain
        bound = (training_flops(forward, recompute=recompute) - training_flops(forward)) * tokens
        assert 0.5 * bound < repeated <= bound * 1.001, recompute
