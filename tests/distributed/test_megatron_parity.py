"""Our layer in Megatron's GPTModel has the logits, gradients, auxiliary terms and bytes of our own model.

Megatron runs on four ranks over gloo, with its own groups, DDP and gradient reduction. The oracle is our model on one rank.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.cover import exhaustive, full
from tests.support.megatron_model import (
    HIDDEN_DIM,
    MOE_LAYERS,
    ONE_GROUP,
    RECOMPUTE_ALL,
    RECOMPUTE_MOE,
    SEQ_LEN,
    Layout,
    TokenBatch,
    causal_mask,
    expert_layers,
    gradients_of,
    largest_difference,
    megatron_tensors,
    our_loss,
    place_of,
)
from tests.support.megatron_run import build, megatron, own_sequences, tracked
from tests.support.worlds import RankContext

pytestmark = pytest.mark.megatron


def remote_rows(ours: Any, whole: TokenBatch, layout: Layout, state: Any) -> int:
    """Returns how many rows this rank sends: for each layer and token, the number of other ranks that hold a chosen
    expert."""
    placement, own = layout.settings.place(layout.ep), state.get_expert_model_parallel_rank()
    sequences, width = own_sequences(state), SEQ_LEN // layout.tp
    pairs: set[tuple[int, int, int]] = set()

    def keep(router: Any, _: Any, routing: Any) -> None:
        taken = routing.assignments.taken()
        for token, expert in zip(taken.token_N.tolist(), taken.expert_N.tolist(), strict=True):
            sequence, position = divmod(token, SEQ_LEN)
            if sequences.start <= sequence < sequences.stop and position // width == state.get_tensor_model_parallel_rank():
                pairs.add((id(router), token, placement.rank_of_expert[expert]))

    handles = [layer.router.register_forward_hook(keep) for layer in ours.moe_modules()]
    with torch.no_grad():
        our_loss(ours, whole, layout.settings, aux=False)
    for handle in handles:
        handle.remove()
    return sum(rank != own for _, _, rank in pairs)


def parity(rank: RankContext, layout: Layout) -> dict[str, Any]:
    """Runs forward and backward of both models. Returns differences, the bytes, and the tracked auxiliary terms."""
    with megatron(layout) as state:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        model, ours, mine, whole = build(layout, state)
        model.zero_grad_buffer()
        with torch.no_grad():
            model.eval()
            logits = model(mine.tokens_BS, mine.positions, causal_mask(), padding_mask=mine.modality_BS)
            logits = gather_from_tensor_model_parallel_region(logits)
            model.train()
        layers = list(expert_layers(model))
        for layer in layers:
            layer.comm_stats.take()
        losses = model(mine.tokens_BS, mine.positions, causal_mask(), labels=mine.labels_BS, padding_mask=mine.modality_BS)
        forward = sum(layer.comm_stats.payload_bytes for layer in layers)
        per_token = model.config.calculate_per_token_loss
        counted = mine.modality_BS >= 0
        (losses[counted].sum() if per_token else losses.mean()).backward()
        both = sum(layer.comm_stats.payload_bytes for layer in layers)
        finalize_model_grads([model], counted.sum() if per_token else None)

        loss, expected, terms = our_loss(ours, whole, layout.settings, aux=layout.aux, masked=per_token)
        loss.backward()
        gradients = gradients_of(model)
        wanted = megatron_tensors(model.module, ours, place_of(layout, state), gradients=True)
        sums = torch.tensor([forward, both, remote_rows(ours, whole, layout, state)])
        dist.all_reduce(sums)
        return {
            "logits": float((logits - expected[own_sequences(state)]).abs().max()),
            "gradients": largest_difference(gradients, wanted),
            "scale": max(float(grad.abs().max()) for grad in gradients.values()),
            "bytes": sums.tolist(),
            "tracked": tracked(),
            "aux": terms,
            "recompute": [layer.moe.recompute for layer in layers],
        }


LAYOUTS = [
    Layout(ep=2, tp=2, uneven=True),
    full(Layout(ep=4, options=RECOMPUTE_ALL)),
    Layout(ep=4, uneven=True, options=RECOMPUTE_MOE),
    full(Layout(ep=2, options={"calculate_per_token_loss": True})),
    exhaustive(Layout(ep=1)),
    exhaustive(Layout(ep=4, tp=2)),
    exhaustive(Layout(ep=4, values=ONE_GROUP)),
    exhaustive(Layout(ep=4, options={**RECOMPUTE_MOE, "recompute_modules": ["moe_act"], "moe_grouped_gemm": True})),
]


def recompute_of(layout: Layout) -> tuple[str, int]:
    """Returns our name for Megatron's recompute mode, and how often rows are exchanged in forward and backward.

    `moe` keeps the routing and does not repeat combine, `moe_act` recomputes between the exchanges, and full recompute
    repeats dispatch and combine.
    """
    if layout.options.get("recompute_granularity") == "full":
        return "none", 6
    modules = layout.options.get("recompute_modules", ())
    return ("block", 5) if "moe" in modules else ("experts", 4) if "moe_act" in modules else ("none", 4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_megatrons_model_with_our_layer_gives_what_ours_gives(
    run_in_world: Callable[..., list[Any]], layout: Layout
) -> None:
    for outcome in run_in_world(4, parity, layout):
        difference, where = outcome["gradients"]
        assert outcome["logits"] <= 1e-5
        assert outcome["scale"] > 1e-2  # otherwise small gradients would always agree
        assert difference <= 1e-5, where
        forward, both, rows = outcome["bytes"]
        assert forward == 2 * rows * HIDDEN_DIM * 4
        policy, exchanges = recompute_of(layout)
        assert outcome["recompute"] == [policy] * len(MOE_LAYERS)
        assert both == exchanges * rows * HIDDEN_DIM * 4
        assert (rows > 0) == (layout.ep > 1)
        for name, expected in outcome["aux"].items():
            assert [outcome["tracked"][name][layer] for layer in MOE_LAYERS] == pytest.approx(expected, rel=1e-5)
