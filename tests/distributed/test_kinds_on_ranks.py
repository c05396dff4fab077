"""For every kind of router, controller and adapter, N ranks and one rank have equal losses, counts, gradients, and
parameters after two optimizer steps. test_n_ranks_equal_one.py has the layouts of the default kinds, and variants of the
model.

Expert choice and mixture of depths choose among the tokens of a selection scope, and a capacity counts within a rank.
The reference is therefore one process that divides its tokens into as many parts as the layout has scopes.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.comm.names import CHOICE_LOGITS, DEPTH_SCORES
from tests.support.cover import exhaustive, full, others_full
from tests.support.layouts import HIDDEN_DIM, LAYERS, MICRO_BATCHES, STEPS, Layout, Outcome, train
from tests.support.outcomes import assert_same_tensors

CAPACITY = [
    Layout(2, 1, "pinned", "ddp", "block", capacity=0.6, balance_scope="step", free=True),
    Layout(4, 1, "uneven", "fsdp2", capacity=0.6, balance_scope="step", free=True),
    Layout(4, 2, "pinned", capacity=0.6, balance_scope="step"),  # a rank without tokens
]
LIMITED = [
    Layout(2, 2, "interleaved", "fsdp2", "block", limited=True, balance=True),
    Layout(4, 1, "uneven", "ddp", "experts", limited=True, balance=True),
    Layout(4, 1, "interleaved", limited=True, balance=True, overlap=True, chunks=2),
    Layout(4, 1, "uneven", "ddp", "block", limited=True, balance=True, ranks_per_node=2),
]
CONTROLLED = [
    Layout(recompute="block", balance=True),
    Layout(1, 2, balance=True),
    Layout(2, 1, "pinned", balance=True),
    Layout(2, 1, "interleaved", "fsdp2", "block", balance=True),
    Layout(4, 1, "uneven", "ddp", "experts", balance=True),
    Layout(2, 2, "pinned", "fsdp2", balance=True),
    Layout(4, 1, "uneven", balance=True, overlap=True, chunks=2),
]
BY_GROUP = [
    full(Layout(4, 1, "uneven", "fsdp2", balance=True, balance_per="group")),
    Layout(2, 1, "pinned", "fsdp2", balance=True, balance_per="group"),
    exhaustive(Layout(2, 1, "pinned", balance=True, balance_per="group")),
]
CHOICE = [
    Layout(4, 1, "uneven", "fsdp2", "block", choice="rank"),
    Layout(2, 2, "interleaved", "ddp", "block", choice="rank", noise=1.0, per_pair=True),
    Layout(4, 2, "pinned", "fsdp2", "experts", choice="rank", per_pair=True),
    Layout(4, 1, "uneven", choice="rank", ranks_per_node=2),
    Layout(2, 1, "pinned", "fsdp2", "block", choice="ep_group", noise=1.0),
    Layout(2, 2, "interleaved", "ddp", "block", choice="ep_group", noise=1.0),
    Layout(4, 2, "pinned", "fsdp2", "experts", choice="ep_group"),
    Layout(4, 1, "uneven", "ddp", "block", choice="world", noise=1.0),
    Layout(2, 2, "pinned", "fsdp2", "block", choice="world", noise=1.0),
    Layout(2, 2, "pinned", "fsdp2", "experts", choice="rank", mixture_of_depths="rank"),
    # The loss of auxiliary routers is a mean over the micro-batch of a scope. The reference has the same loss only if
    # one scope spans all ranks.
    Layout(2, 1, "interleaved", "fsdp2", "block", choice="world", choice_causal="auxiliary"),
    Layout(2, 2, "pinned", "ddp", "experts", choice="world", choice_causal="auxiliary"),
]
DEPTHS = [
    Layout(2, 1, "interleaved", mixture_of_depths="rank"),
    Layout(4, 1, "uneven", "ddp", "experts", mixture_of_depths="rank", depth_causal="auxiliary"),
    Layout(4, 1, "pinned", "fsdp2", "block", mixture_of_depths="world"),
    Layout(2, 2, "pinned", "fsdp2", mixture_of_depths="ep_group", depth_causal="auxiliary"),
    Layout(4, 1, "uneven", overlap=True, chunks=2, mixture_of_depths="ep_group"),
]
LORA = [
    Layout(4, 1, data="fsdp2", recompute="block", lora="probability"),
    Layout(2, 1, recompute="block", lora="published"),
    Layout(2, 2, data="fsdp2", lora="probability"),
    Layout(1, 2, data="fsdp2", recompute="experts", lora="straight_through"),
    Layout(4, 1, recompute="experts", lora="straight_through"),
]
ADAPTED_EXPERTS = [
    Layout(2, 2, data="fsdp2", ffn_lora="each", attention_lora=True),
    Layout(4, 1, "uneven", recompute="experts", ffn_lora="each"),  # the last rank has no expert
    Layout(4, 1, "uneven", data="fsdp2", recompute="block", ffn_lora="shared"),
    Layout(1, 2, data="fsdp2", recompute="experts", ffn_lora="each"),
    Layout(2, 2, "pinned", ffn_lora="shared"),
    Layout(4, 1, "uneven", ffn_lora="shared", attention_lora=True, pair_budget=5),
    Layout(4, 2, "uneven", data="fsdp2", ffn_lora="each"),
    Layout(2, 2, data="fsdp2", recompute="experts", ffn_lora="each", form="gpt_oss, adapted"),
    Layout(2, 1, "pinned", ffn_lora="each", attention_lora=True, limited=True, form="deepseek_v3, adapted"),
    Layout(2, 2, data="fsdp2", recompute="block", ffn_lora="shared", limited=True, form="deepseek_v3, adapted"),
]


def adaptive() -> list[Any]:
    """Returns the layouts of the routers that choose a different number of experts for each token."""
    found: list[Any] = []
    for number, kind in enumerate(("top_p", "relu", "threshold", "predicted_k", "expert_threshold")):
        alone = Layout(adaptive=kind, **({"choice": "world"} if kind == "expert_threshold" else {"free": True}))
        two = replace(alone, ep=2, placement="pinned", data=("ddp", "fsdp2")[number % 2], recompute="block")
        found.append(two if kind in ("relu", "expert_threshold") else full(two))
        found.append(full(replace(alone, ep=4, placement="uneven", recompute="experts")))
        found.append(full(replace(alone, ep=2, edp=2, data="fsdp2", chunks=2)))
    return found


CASES = [
    *others_full(CAPACITY, keep=1),
    Layout(2, 1, "pinned", limited=True, balance=True),
    *others_full(LIMITED, keep=0),
    *others_full(CONTROLLED, keep=0),  # LIMITED and BY_GROUP have the controllers
    *BY_GROUP,
    *adaptive(),
    Layout(2, 1, "interleaved", "ddp", "block", choice="rank", noise=1.0, overlap=True, chunks=2),
    Layout(2, 1, "interleaved", "ddp", "block", choice="rank", mixture_of_depths="rank"),
    Layout(4, 1, "uneven", choice="world", choice_causal="auxiliary"),
    *others_full(CHOICE, keep=0),
    Layout(2, 1, "pinned", "ddp", "block", mixture_of_depths="world", depth_causal="auxiliary"),
    *others_full(DEPTHS, keep=0),
    Layout(2, 1, lora="probability"),
    *others_full(LORA, keep=0),
    Layout(2, 1, "pinned", recompute="block", ffn_lora="each", attention_lora=True),
    *others_full(ADAPTED_EXPERTS, keep=0),
]
# The layout's fields that change the training itself. The reference has the same values of these fields.
KINDS = (
    "capacity", "free", "balance", "balance_per", "limited", "adaptive", "choice_causal", "noise", "mixture_of_depths",
    "depth_causal", "lora", "ffn_lora", "attention_lora", "balance_scope", "form",
)  # fmt: skip
OneRank = Callable[[Layout], tuple[Path, Outcome]]


def on_one_rank(layout: Layout) -> Layout:
    """Returns the layout of the one-process reference for `layout`."""

    def scopes(kind: str) -> int:
        return {"rank": layout.world_size, "ep_group": layout.edp, "world": 1}[kind]

    alone = Layout(**{name: getattr(layout, name) for name in KINDS})
    if layout.choice:
        return replace(alone, choice="rank", parts=scopes(layout.choice))
    if layout.mixture_of_depths:
        return replace(alone, mixture_of_depths="world", depth_parts=scopes(layout.mixture_of_depths))
    return replace(alone, parts=layout.world_size) if layout.capacity else alone


@pytest.fixture(scope="session")
def one_rank(run_in_world: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    """Returns a function from a layout to the folder of its initial weights and the outcome of its reference. Both are
    cached."""
    made: dict[Layout, tuple[Path, Outcome]] = {}

    def of(layout: Layout) -> tuple[Path, Outcome]:
        alone = on_one_rank(layout)
        if alone not in made:
            folder = tmp_path_factory.mktemp("start")
            made[alone] = folder, run_in_world(1, train, alone, folder)[0]
        return made[alone]

    return of


@pytest.mark.parametrize("layout", CASES, ids=str)
def test_layout_equals_one_rank(run_in_world: Callable[..., list[Any]], one_rank: OneRank, layout: Layout) -> None:
    folder, oracle = one_rank(layout)
    outcomes: list[Outcome] = run_in_world(layout.world_size, train, layout, folder)
    for outcome in outcomes:
        for step, expected in zip(outcome.steps, oracle.steps, strict=True):
            same_step(step, expected)
            sent_bytes(layout, step.ledger)
        assert outcome.events == outcomes[0].events, "the recorded order of collectives differs between ranks"
        torch.testing.assert_close(outcome.biases, oracle.biases, rtol=0, atol=0)
        torch.testing.assert_close(outcome.buffers, oracle.buffers, rtol=0, atol=1e-9)
        torch.testing.assert_close(outcome.buffers, outcomes[0].buffers, rtol=0, atol=0)
    assert_same_tensors(outcomes, oracle)
    if not layout.capacity:  # the reference does not divide its last forward, which also has a capacity
        logits = np.concatenate([outcome.logits for outcome in outcomes])
        np.testing.assert_allclose(logits, oracle.logits, rtol=0, atol=1e-9)
    collectives(layout, outcomes[0].events)
    PRESENT[kind_of(layout)](layout, oracle)


def same_step(step: Any, expected: Any) -> None:
    for counts in ("choices_LC", "tokens_LG", "dropped_LE", "above_LE", "unrouted_LG"):
        np.testing.assert_array_equal(getattr(step.counts, counts), getattr(expected.counts, counts), err_msg=counts)
    assert step.ledger["pairs"] == expected.ledger["pairs"]
    for name in ("nll_M", "grad_norm", "balance", "z", "auxiliary"):
        np.testing.assert_allclose(getattr(step, name), getattr(expected, name), rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(step.counts.entropy_LG, expected.counts.entropy_LG, rtol=1e-9)
    depths, wanted = step.mixture_of_depths, expected.mixture_of_depths
    assert (depths is None) == (wanted is None)
    if wanted is not None:
        for counted in ("tokens_LG", "taken_LG", "agreed_L"):
            np.testing.assert_array_equal(getattr(depths, counted), getattr(wanted, counted), err_msg=counted)
        np.testing.assert_allclose(depths.weight_L, wanted.weight_L, rtol=1e-9)


def sent_bytes(layout: Layout, ledger: Any) -> None:
    if layout.lora:
        assert not any(ledger[key] for key in ledger if key != "pairs"), "nothing crosses the wire"
        return
    if not (layout.ranks_per_node or layout.per_pair):  # these count the rows of two hops, or a row per pair
        assert (layout.ep > 1) <= ledger["rows_remote"] <= ledger["rows_bound"]
    if not layout.ffn_lora:  # backward sends no gradient below the first adapter
        crossings = 5 if layout.recompute == "block" else 4
        if layout.choice_causal == "auxiliary":  # the inputs of auxiliary routers get no gradient
            crossings = 2
        assert ledger["payload_bytes"] == crossings * ledger["rows_remote"] * HIDDEN_DIM * 8


def collectives(layout: Layout, events: list[str]) -> None:
    passes = STEPS * MICRO_BATCHES
    scores = passes + 1 if layout.mixture_of_depths not in (None, "rank") else 0
    assert events.count(DEPTH_SCORES) == scores
    if layout.choice:
        exchanged = LAYERS * passes if layout.choice != "rank" else 0
        assert events.count(CHOICE_LOGITS) == exchanged, "once a layer and micro-batch, also under recompute"
        # Known counts need no exchange of counts. The final evaluation chooses by thresholds, and needs an exchange.
        hop = "inter-node " if layout.ranks_per_node else ""
        assert events.count(f"{hop}counts") == LAYERS * (1 if layout.per_pair else 1 + passes)


def kind_of(layout: Layout) -> str:
    """Returns the first field in `PRESENT` that the layout sets."""
    return next(kind for kind in PRESENT if getattr(layout, kind) != getattr(Layout(), kind))


def number_of_experts_differs(layout: Layout, oracle: Outcome) -> None:
    counts = sum(step.counts.choices_LC for step in oracle.steps)
    tokens = sum(step.counts.tokens_LG for step in oracle.steps)
    assert (counts[:, :5].sum(1) % tokens[:, 0] != 0).all()
    assert layout.choice or any(bias.any() for bias in oracle.biases.values())


def experts_leave_tokens_out(layout: Layout, oracle: Outcome) -> None:
    assert oracle.steps[0].counts.choices_LC.any()
    assert oracle.steps[0].counts.unrouted_LG.any()


def tokens_skip_a_layer(layout: Layout, oracle: Outcome) -> None:
    first = oracle.steps[0].mixture_of_depths
    assert (first.layers, first.token_share, first.groups) == ((0,), 0.3, ("text", "image"))
    # each scope rounds the number of selected tokens up
    assert 0.29 < first.taken_LG.sum() / first.tokens_LG.sum() < 0.4
    np.testing.assert_array_equal(oracle.steps[0].counts.tokens_LG, [first.taken_LG[0], first.tokens_LG[0]])
    last = "threshold" if layout.depth_causal == "threshold" else "auxiliary.outer"
    routers = {name for name in oracle.parameters if ".depths." in name}
    assert {"layers.0.depths.router", f"layers.0.depths.{last}"} <= routers
    assert all(np.abs(oracle.gradients[name]).max() > 0 for name in routers & oracle.gradients.keys())


def adapters_alone_learn(layout: Layout, oracle: Outcome) -> None:
    trained = (".a", ".b", "_a", "_b") if layout.ffn_lora else ("_a", "_b", ".a", ".b", ".true", ".null")
    assert all(name.endswith(trained) for name in oracle.gradients)
    part = "gate_up" if layout.ffn_lora else ".moe.adapters."
    assert any(part in name and gradient.any() for name, gradient in oracle.gradients.items())


def all_columns_are_chosen_and_biases_move(layout: Layout, oracle: Outcome) -> None:
    choices_LC = sum(step.counts.choices_LC for step in oracle.steps)
    nulls = sum(group.num_null for group in layout.groups)
    assert (choices_LC[:, 8 : 8 + nulls].sum(1) > 0).all()
    assert (choices_LC[:, 8 + nulls :].sum(1) > 0).all() or not layout.limited
    assert all(bias.any() for bias in oracle.biases.values())


def pairs_are_dropped(layout: Layout, oracle: Outcome) -> None:
    assert all(step.counts.dropped_LE.any() for step in oracle.steps)


# Checks that a reference uses the first of these fields that its layout sets; otherwise its comparison could not fail.
PRESENT: dict[str, Callable[[Layout, Outcome], None]] = {
    "adaptive": number_of_experts_differs,
    "choice": experts_leave_tokens_out,
    "mixture_of_depths": tokens_skip_a_layer,
    "lora": adapters_alone_learn,
    "ffn_lora": adapters_alone_learn,
    "capacity": pairs_are_dropped,
    "balance": all_columns_are_chosen_and_biases_move,
}


def test_references_of_different_kinds_differ(one_rank: OneRank) -> None:
    """The comparisons above therefore notice a wrong selection scope, and a controller that corrects experts instead of
    groups."""
    depths = [one_rank(Layout(ep, mixture_of_depths="rank"))[1].logits for ep in (1, 2)]
    assert np.abs(depths[0] - depths[1]).max() > 1e-3
    by_expert, by_group = (one_rank(Layout(balance=True, balance_per=per))[1].biases for per in ("expert", "group"))
    assert any((by_expert[name] != bias).any() for name, bias in by_group.items())
