"""A replay of routing in Megatron's GPTModel with our layer has the recorded step's loss and reduced gradients, bit for
bit. Two micro-batches both go forward before the first goes backward, as in a pipeline."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_dist.moe.replayed_routers import Replay
from tests.support.agreement import reversed_scores
from tests.support.cover import exhaustive
from tests.support.megatron_model import RECOMPUTE_ALL, RECOMPUTE_MOE, Layout, causal_mask, expert_layers, gradients_of
from tests.support.megatron_run import build, megatron, tracked
from tests.support.worlds import RankContext

pytestmark = pytest.mark.megatron


def three_steps(rank: RankContext, layout: Layout) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Returns loss and gradients of a step recorded with reversed scores, of its replay, and of a plain step."""
    with megatron(layout) as state:
        from megatron.core.distributed import finalize_model_grads

        model, _, mine, _ = build(layout, state)
        half = len(mine.tokens_BS) // 2
        parts = [mine.part(slice(half)), mine.part(slice(half, None))]
        routers = [layer.moe.router for layer in expert_layers(model)]

        def step() -> tuple[np.ndarray, dict[str, np.ndarray]]:
            model.zero_grad_buffer()
            losses = [
                model(part.tokens_BS, part.positions, causal_mask(), labels=part.labels_BS, padding_mask=part.modality_BS)
                for part in parts
            ]
            for hook in hooks:
                hook.remove()  # recompute must record nothing twice
            for loss in losses:
                loss.mean().backward()
            finalize_model_grads([model], None)
            tracked()
            gradients = {name: grad.clone().numpy() for name, grad in gradients_of(model).items()}
            return torch.stack(losses).detach().numpy(), gradients

        ids: list[list[Tensor]] = [[] for _ in routers]
        groups: list[Tensor] = []

        def keep(router: Any, inputs: Any, _: Any) -> None:
            _, group_T, cache = inputs
            ids[routers.index(router)].append(torch.where(router._valid(group_T), cache.choice_TK, -1))
            groups.extend([group_T] * (router is routers[0]))

        hooks = [router.register_forward_hook(keep) for router in routers]
        for router in routers:
            router._selection_scores = reversed_scores
        found = [step()]
        for router in routers:
            del router._selection_scores
        ids_TLK = torch.stack([torch.cat(each) for each in ids], 1).to(torch.int16).numpy()
        for context in (Replay(model, ids_TLK, torch.cat(groups).numpy()), nullcontext()):
            with context:
                found.append(step())
        return found


@pytest.mark.parametrize(
    "layout",
    [Layout(ep=2, uneven=True, options=RECOMPUTE_MOE), exhaustive(Layout(ep=2, tp=2, options=RECOMPUTE_ALL))],
    ids=str,
)
def test_a_replay_in_megatron_has_the_bits_of_the_record(run_in_world: Callable[..., list[Any]], layout: Layout) -> None:
    for recorded, replayed, plain in run_in_world(4, three_steps, layout):
        assert np.array_equal(replayed[0], recorded[0])
        assert not np.array_equal(plain[0], recorded[0])
        for name, gradient in recorded[1].items():
            assert np.array_equal(replayed[1][name], gradient), name
        assert all(gradient.any() for name, gradient in replayed[1].items() if "router" in name)
