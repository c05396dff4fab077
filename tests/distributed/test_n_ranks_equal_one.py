"""N ranks and one rank have equal losses, gradients, norms, and parameters after three optimizer steps.

For the layouts, `make test` covers each value of each axis but FURTHER_VALUES, `make test-full` covers each pair of values,
and `make test-exhaustive` covers the whole product. The second test compares each variant of the model with its own
one-rank run.

One sequence is all padding, one has only text and one has only pictures. With 8 ranks, some ranks therefore have no
token, and some have tokens of one modality only.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.comm.names import EXPERT_IDS, PAIR_ROWS
from tests.support.cover import exhaustive, full, others_full
from tests.support.layouts import HIDDEN_DIM, LAYERS, MICRO_BATCHES, STEPS, Layout, Outcome, train
from tests.support.outcomes import assert_equal_one_rank, assert_same_tensors, merged_outcomes

SIZES = [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)]
LAYOUTS = [
    Layout(ep, edp, placement, data, recompute)
    for (ep, edp), placement, data, recompute in product(
        SIZES, ("pinned", "interleaved", "uneven"), ("ddp", "fsdp2"), ("none", "experts", "block")
    )
    if not (ep == 1 and placement != "interleaved")
    # `experts` recomputes only computation between the exchanges, so 8 ranks would test nothing that 4 do not.
    and not (ep * edp == 8 and recompute == "experts")
]
ONE_RANK = [
    Layout(data=data, recompute=recompute, pair_budget=budget)
    for data, recompute, budget in product(("ddp", "fsdp2"), ("none", "experts", "block"), (None, 7))
    if (data, recompute, budget) != ("ddp", "none", None)
]
TIMETABLES = [
    Layout(2, 1, "pinned", overlap=True),
    Layout(2, 1, "interleaved", "fsdp2", "block", overlap=True),
    Layout(4, 1, "uneven", "ddp", "experts", overlap=True),
    Layout(1, 1, overlap=True, chunks=2),
    Layout(2, 2, "pinned", "fsdp2", "block", overlap=True, chunks=3),
    Layout(2, 1, "interleaved", chunks=2),
    Layout(2, 2, "interleaved", "fsdp2", chunks=3),
    Layout(4, 1, "uneven", "fsdp2", "block", chunks=2),
    Layout(4, 2, "pinned", "ddp", "experts", overlap=True, chunks=4),
    Layout(4, 1, "uneven", "ddp", "block", pair_budget=5, overlap=True, chunks=2),
]
HALVES = [
    Layout(2, 1, "pinned", halves=True),
    Layout(2, 2, "interleaved", "fsdp2", "experts", fsdp_gather="step", halves=True),
    Layout(4, 1, "uneven", "ddp", "experts", pair_budget=5, halves=True),
    Layout(1, 1, "interleaved", "fsdp2", fsdp_gather="step", halves=True),
]
NODES = [
    *(Layout(4, 1, "uneven", "ddp", recompute, ranks_per_node=2) for recompute in ("none", "experts", "block")),
    Layout(4, 2, "pinned", "fsdp2", "block", ranks_per_node=2),
    Layout(2, 2, "pinned", "ddp", "block", ranks_per_node=1),
]
WHOLE = 1e9  # a bound of static exchanges that no choice exceeds
STATIC = [
    Layout(2, 1, "pinned", "ddp", "experts", room=WHOLE),
    Layout(4, 1, "uneven", "fsdp2", "block", room=WHOLE),
    Layout(2, 2, "interleaved", room=WHOLE),
]
EXTRA = [Layout(4, 1, "uneven", "ddp", "block", pair_budget=5)]
EXTRA += [Layout(2, 2, "interleaved", "fsdp2", "block", fsdp_gather="step"), Layout(2, 1, data="fsdp2", fsdp_gather="step")]
# Other test cases have another budget and other nodes. VARIANTS has the loss in parts with tied embeddings.
FURTHER_VALUES = [
    exhaustive(Layout(1, 1, room=WHOLE)),
    full(Layout(2, 2, "interleaved", "fsdp2", room=4.0)),
    full(Layout(2, 2, "pinned", "fsdp2", "none", pair_budget=3)),
    full(Layout(2, 1, "pinned", "fsdp2", "block", loss_words=50)),
    full(Layout(4, 1, "interleaved", "fsdp2", pair_budget=5, ranks_per_node=4)),
    exhaustive(Layout(2, 2, "interleaved", "ddp", loss_words=50)),
]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of the checkpoint whose initial weights every layout loads."""
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="session")
def one_rank(run_in_world: Callable[..., list[Any]], start: Path) -> Outcome:
    """Returns the outcome of the oracle, which is one process without recompute."""
    return run_in_world(1, train, Layout(), start)[0]


@pytest.mark.parametrize(
    "layout",
    [*others_full(LAYOUTS + ONE_RANK + TIMETABLES + HALVES + EXTRA + NODES + STATIC), *FURTHER_VALUES],
    ids=str,
)
def test_layout_equals_one_rank(
    run_in_world: Callable[..., list[Any]], start: Path, one_rank: Outcome, layout: Layout
) -> None:
    outcomes = run_in_world(layout.world_size, train, layout, start)
    for outcome in outcomes:
        for step, expected in zip(outcome.steps, one_rank.steps, strict=True):
            np.testing.assert_array_equal(step.counts.choices_LC, expected.counts.choices_LC)
            np.testing.assert_array_equal(step.counts.tokens_LG, expected.counts.tokens_LG)
            np.testing.assert_array_equal(step.labels_M, expected.labels_M)
            assert step.tokens == expected.tokens
            assert step.ledger["pairs"] == expected.ledger["pairs"]
            # A step exchanges rows twice in forward and twice in backward. Recompute of blocks repeats one exchange;
            # recompute of experts repeats none. With nodes an exchange has two hops, and `rows_remote` counts both.
            crossings = 5 if layout.recompute == "block" else 4
            rows = step.ledger["rows_remote"] + step.ledger["rows_padding"]
            assert step.ledger["payload_bytes"] == crossings * rows * HIDDEN_DIM * 8
            assert step.ledger["rows_padding"] == 0 or layout.room
            between = step.ledger["inter_node_bytes"]
            assert (0 < between < step.ledger["payload_bytes"]) == (len(hops_of(layout)) == 2)
            np.testing.assert_allclose(step.nll_M, expected.nll_M, rtol=1e-9)
            np.testing.assert_allclose(step.counts.entropy_LG, expected.counts.entropy_LG, rtol=1e-9)
            np.testing.assert_allclose(
                [step.grad_norm, step.balance, step.z], [expected.grad_norm, expected.balance, expected.z], rtol=1e-9
            )
    assert_same_tensors(outcomes, one_rank)
    logits = np.concatenate([outcome.logits for outcome in outcomes])
    np.testing.assert_allclose(logits, one_rank.logits, rtol=0, atol=1e-9)
    first = outcomes[0].events
    # Each layer plans once per (half) micro-batch, also with recompute. The last forward, for the logits, adds one plan.
    plans = LAYERS * (STEPS * MICRO_BATCHES * (1 + layout.halves) + 1) if layout.ep > 1 else 0
    ids = PAIR_ROWS if layout.ranks_per_node is None else EXPERT_IDS
    for hop in hops_of(layout):
        assert first.count(f"{hop}counts") == first.count(f"{hop}{ids}") == plans
    for outcome in outcomes[1:]:
        assert outcome.events == first, "the recorded order of collectives differs between ranks"


def hops_of(layout: Layout) -> list[str]:
    """Returns the prefixes of the layout's exchange names. A hop inside a group of one rank has no exchange."""
    if layout.ranks_per_node is None:
        return [""]
    sizes = {"inter-node ": layout.ep // layout.ranks_per_node, "intra-node ": layout.ranks_per_node}
    return [hop for hop, size in sizes.items() if size > 1]


LONGCAT, GPT_OSS, CLAMPED, RESIDUAL = "longcat_flash", "gpt_oss", "clamped experts, nulls", "gating_residual"
VARIANTS = [
    # Identity and constant experts are replicated on all ranks, or sharded like the dense parameters.
    full(Layout(2, 2, "pinned", "ddp", "block", free=True)),
    full(Layout(4, 1, "uneven", "fsdp2", "experts", free=True)),
    exhaustive(Layout(2, 2, "interleaved", "fsdp2", "none", free=True)),
    # The auxiliary terms of a step do not depend on how it is divided into micro-batches and ranks.
    exhaustive(Layout(parts=4, balance_scope="step")),
    full(Layout(2, 2, "pinned", "fsdp2", "block", parts=2, balance_scope="step")),
    Layout(4, 1, "uneven", "ddp", parts=2, balance_scope="step", balance_loss="null_split"),
    # All null experts share one logit, or the balance loss is of another kind.
    Layout(2, 1, "pinned", "ddp", "block", null_logit="single", balance_loss="null_split"),
    exhaustive(Layout(4, 1, "uneven", "fsdp2", null_logit="single", balance_loss="null_split")),
    full(Layout(2, 2, "interleaved", null_logit="single", balance_loss="vanilla")),
    exhaustive(Layout(4, 1, "uneven", "ddp", "block", balance_loss="vanilla")),
    exhaustive(Layout(2, 1, "pinned", balance_loss="null_split")),
    Layout(2, 1, "pinned", "fsdp2", balance_loss="weighted", null_weight=(2.0, 0.5), free=True),
    # The loss is computed in parts of 50 words, with tied embeddings.
    Layout(2, 1, "pinned", "fsdp2", "block", loss_words=50, tied=True),
    full(Layout(2, 1, "pinned", "ddp", "block", loss_words=50, tied=True)),
    # torch.compile compiles the dense parts.
    full(Layout(2, data="fsdp2", recompute="block", compiled=True)),
    exhaustive(Layout(2, compiled=True)),
    # FSDP2 shards some stacks by experts, and some inside experts; with 8 ranks some have no row of a matrix.
    Layout(1, 2, data="fsdp2", optimizer="muon"),
    full(Layout(2, 2, "interleaved", "fsdp2", optimizer="muon")),
    full(Layout(4, 1, "uneven", "fsdp2", optimizer="muon")),
    exhaustive(Layout(2, 1, "pinned", "ddp", "block", optimizer="muon")),
    exhaustive(Layout(2, 2, "pinned", "ddp", optimizer="muon")),
    exhaustive(Layout(4, 2, "interleaved", "fsdp2", "block", optimizer="muon")),
    # The loss includes the KL from a teacher. Batches have prompts, padding, and a rank without labels.
    Layout(2, 1, "pinned", "fsdp2", "block", distilled="forward"),
    full(Layout(1, 2, distilled="forward")),
    full(Layout(4, 1, "uneven", "ddp", "experts", distilled="forward")),
    full(Layout(2, 2, "interleaved", "fsdp2", distilled="reverse")),
    # The models have shortcuts with latent attention (LongCat-Flash), sinks with clamped experts (gpt-oss), or gating
    # residuals (MoE++).
    exhaustive(Layout(2, 2, "interleaved", "fsdp2", "block", form=LONGCAT, free=True)),
    Layout(4, 1, "uneven", "ddp", "experts", form=LONGCAT, free=True),
    full(Layout(2, 1, "pinned", "fsdp2", "none", form=LONGCAT, free=True)),
    exhaustive(Layout(2, 2, "pinned", "ddp", "block", form=LONGCAT, free=True)),
    full(Layout(2, 2, "interleaved", "fsdp2", "block", form=GPT_OSS)),
    exhaustive(Layout(4, 1, "uneven", "ddp", "experts", form=GPT_OSS)),
    exhaustive(Layout(1, 2, "interleaved", "fsdp2", "experts", form=GPT_OSS)),
    exhaustive(Layout(2, 2, "pinned", "ddp", "block", form=GPT_OSS)),
    full(Layout(2, 2, "interleaved", "fsdp2", "none", form=CLAMPED, pair_budget=5)),
    full(Layout(2, 1, "pinned", "ddp", "block", form=RESIDUAL, free=True)),
    full(Layout(4, 1, "uneven", "fsdp2", "block", form=RESIDUAL, free=True)),
    exhaustive(Layout(2, 2, "pinned", "fsdp2", "experts", form=RESIDUAL)),
    exhaustive(Layout(2, 2, "interleaved", "ddp", "none", form=RESIDUAL)),
]
# For each form of the model: one parameter of each part that only this form has.
PARTS: dict[str | None, set[str]] = {
    None: set(),
    LONGCAT: {
        "layers.2.attention.kv_up.weight",
        "layers.2.moe.shared.down.weight",
        "layers.3.ffn.down.weight",
        "layers.0.moe.free.text.gate",
    },
    GPT_OSS: {"layers.1.attention.sinks", "layers.1.moe.router.text.offset", "layers.0.moe.experts.text.0.down_bias"},
    CLAMPED: {"layers.1.attention.sinks", "layers.0.moe.experts.image.0.gate_bias"},
    RESIDUAL: {f"layers.{layer}.moe.router.{group}.residual" for layer in (1, 2) for group in ("text", "image")},
}


@pytest.mark.parametrize("layout", VARIANTS, ids=str)
def test_a_variant_of_the_model_equals_one_rank(
    run_in_world: Callable[..., list[Any]], tmp_path: Path, layout: Layout
) -> None:
    one_rank = assert_equal_one_rank(run_in_world, layout, tmp_path)
    moved = {name for name, gradient in one_rank.gradients.items() if gradient.any()}
    assert moved >= PARTS[layout.form]
    if layout.free:
        free = sum(group.num_identity + group.num_constant for group in layout.groups)
        assert (one_rank.steps[0].counts.choices_LC[:, -free:] > 0).any()
        assert {"layers.0.moe.free.text.vector", "layers.0.moe.free.image.gate"} <= one_rank.parameters.keys()
    if layout.balance_scope == "step":
        assert [step.balance > 0 for step in one_rank.steps] == [False, True, True]
    assert all((step.auxiliary > 0.01) == (layout.distilled is not None) for step in one_rank.steps)


@pytest.mark.parametrize(
    "layout",
    [full(Layout(4, 1, "uneven", precision="float32")), Layout(2, 2, "pinned", "fsdp2", "block", "float32")],
    ids=str,
)
def test_fp32_equals_one_rank_within_rounding(run_in_world: Callable[..., list[Any]], layout: Layout) -> None:
    oracle: Outcome = run_in_world(1, train, Layout(precision="float32"))[0]
    # Two layouts can be compared in fp32 only if no choice depends on rounding.
    assert oracle.smallest_gap > 1e-5
    outcomes = run_in_world(layout.world_size, train, layout)
    for step, expected in zip(outcomes[0].steps, oracle.steps, strict=True):
        np.testing.assert_allclose(step.nll_M, expected.nll_M, rtol=1e-5)
        np.testing.assert_allclose(step.grad_norm, expected.grad_norm, rtol=1e-5)
    for name, value in merged_outcomes(outcomes, "gradients").items():
        expected = oracle.gradients[name]
        assert np.abs(value - expected).max() <= 1e-5 * np.abs(expected).max() + 1e-8, name
