"""Our layer in Megatron's GPTModel equals our own model: logits, gradients, auxiliary terms, bytes.

Four gloo ranks with Megatron's groups, DDP and gradient reduction. The oracle is our transformer on one rank over the whole
batch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.cover import full, full_with_each_version
from tests.support.megatron_model import (
    HIDDEN_DIM,
    MOE_LAYERS,
    ONE_GROUP,
    SEQ_LEN,
    Layout,
    TokenBatch,
    aux_values,
    causal_mask,
    gradients_of,
    largest_difference,
    our_loss,
    with_layers_of,
)
from tests.support.megatron_run import SEQUENCES, build, expected_gradients, megatron, tracked
from tests.support.worlds import RankContext


def remote_rows(ours: Any, whole: TokenBatch, layout: Layout, state: Any) -> int:
    """Counts distinct (token, other rank) pairs of this rank's tokens over all layers, in a loop over our routers'
    choices."""
    settings = layout.settings
    placement = settings.place(layout.ep)
    chosen: list[list[set[int]]] = []

    def keep(_: Any, inputs: Any, routing: Any) -> None:
        taken = routing.assignments.taken()
        ranks: list[set[int]] = [set() for _ in range(inputs[0].shape[0])]
        for token, expert in zip(taken.token_N.tolist(), taken.expert_N.tolist(), strict=True):
            ranks[token].add(placement.rank_of_expert[expert])
        chosen.append(ranks)

    handles = [layer.router.register_forward_hook(keep) for layer in ours.moe_modules()]
    with torch.no_grad():
        our_loss(ours, whole, settings, aux=False)
    for handle in handles:
        handle.remove()
    own, tp, tp_rank = state.get_expert_model_parallel_rank(), layout.tp, state.get_tensor_model_parallel_rank()
    each = SEQUENCES // state.get_data_parallel_world_size()
    first, width = state.get_data_parallel_rank() * each, SEQ_LEN // tp
    mine = [
        sequence * SEQ_LEN + position
        for sequence in range(first, first + each)
        for position in range(tp_rank * width, (tp_rank + 1) * width)
    ]
    return sum(len(layer[token] - {own}) for layer in chosen for token in mine)


def parity(rank: RankContext, layout: Layout) -> dict[str, Any]:
    """Runs forward and backward on both sides. Returns the differences, the bytes and the tracked auxiliary terms."""
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
        for layer in with_layers_of(model):
            layer.comm_stats.take()
        losses = model(mine.tokens_BS, mine.positions, causal_mask(), labels=mine.labels_BS, padding_mask=mine.modality_BS)
        forward = sum(layer.comm_stats.payload_bytes for layer in with_layers_of(model))
        per_token = model.config.calculate_per_token_loss
        counted = mine.modality_BS >= 0
        (losses[counted].sum() if per_token else losses.mean()).backward()
        both = sum(layer.comm_stats.payload_bytes for layer in with_layers_of(model))
        finalize_model_grads([model], counted.sum() if per_token else None)

        loss, expected_logits = our_loss(ours, whole, layout.settings, aux=layout.aux, masked=per_token)
        loss.backward()
        each = mine.tokens_BS.shape[0]
        first = state.get_data_parallel_rank() * each
        gradients = {name.removeprefix("module."): grad for name, grad in gradients_of(model).items()}
        sums = torch.tensor([forward, both, remote_rows(ours, whole, layout, state)])
        dist.all_reduce(sums)
        return {
            "logits": float((logits - expected_logits[first : first + each]).abs().max()),
            "gradients": largest_difference(gradients, expected_gradients(layout, ours, state)),
            "scale": max(float(grad.abs().max()) for grad in gradients.values()),
            "bytes": sums.tolist(),
            "tracked": tracked(),
            "aux": aux_values(ours, whole, layout.settings),
            "recompute": [layer.moe.recompute for layer in with_layers_of(model)],
        }


LAYOUTS = [
    full_with_each_version(Layout(ep=1)),
    full(Layout(ep=2)),
    full(Layout(ep=4)),
    full(Layout(ep=2, uneven=True)),
    full(Layout(ep=4, uneven=True)),
    full_with_each_version(Layout(ep=4, values=ONE_GROUP)),
    full(Layout(ep=4, tp=2)),
    Layout(ep=2, tp=2, uneven=True),
    full_with_each_version(Layout(ep=2, options={"calculate_per_token_loss": True})),
    full(Layout(ep=4, uneven=True, options={"recompute_granularity": "selective", "recompute_modules": ["moe"]})),
    full(
        Layout(
            ep=4,
            options={"recompute_granularity": "selective", "recompute_modules": ["moe_act"], "moe_grouped_gemm": True},
        )
    ),
    Layout(ep=4, options={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
]


def recompute_of(layout: Layout) -> tuple[str, int]:
    """Returns our name for Megatron's recompute, and the number of row exchanges in forward and backward.

    `moe` keeps the routing and does not repeat combine. `moe_act` recomputes only between the exchanges. `full` recomputes
    the layer with both exchanges.
    """
    if layout.options.get("recompute_granularity") == "full":
        return "none", 6
    modules = layout.options.get("recompute_modules", ())
    return ("block", 5) if "moe" in modules else ("experts", 4) if "moe_act" in modules else ("none", 4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_megatrons_model_with_our_layer_gives_what_ours_gives(
    run_with_megatron: Callable[..., list[Any]], layout: Layout
) -> None:
    for outcome in run_with_megatron(4, parity, layout):
        difference, where = outcome["gradients"]
        assert outcome["logits"] <= 1e-5
        assert outcome["scale"] > 1e-2  # the gradients are large enough for the comparison
        assert difference <= 1e-5, where
        forward, both, rows = outcome["bytes"]
        assert forward == 2 * rows * HIDDEN_DIM * 4
        policy, exchanges = recompute_of(layout)
        assert outcome["recompute"] == [policy] * len(MOE_LAYERS)
        assert both == exchanges * rows * HIDDEN_DIM * 4
        assert (rows > 0) == (layout.ep > 1)
        for name, expected in outcome["aux"].items():
            assert [outcome["tracked"][name][layer] for layer in MOE_LAYERS] == pytest.approx(expected, rel=1e-5)
