"""Makes routings in which a simulated router draws each token's choices."""

from collections.abc import Callable

import numpy as np

from moe_dist.monitor.report.routing import Frame, Routing, Tokens, total
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.unit.monitor.conftest import draw_groups

GROUPS = draw_groups(2, num_experts=8, num_null=8, top_k=4)
CONFIGURATION = {"model": {"hidden_dim": 96}, "parallel": {"precision": "fp32"}, "train": {"micro_batch": 2}}
WORDS = ("<eos>", "\n    ", " 12", " def", "self_x", "+=", "<b>", "naïve", "\x00", "a")


def draw_routing(
    groups: tuple[ExpertGroup, ...] = GROUPS,
    *,
    layers: int = 4,
    tokens: int = 600,
    steps: int = 3,
    ranks: int = 4,
    bias: Callable[[np.ndarray, int], None] = lambda preference_LC, group: None,
    seed: int = 0,
) -> Routing:
    """Draws a routing with sequences of 30 tokens. `bias` changes the preferences [L, C] of a group."""
    rng = np.random.default_rng(seed)
    placement = ExpertPlacement.interleaved(groups, ranks)
    modality_T = rng.integers(0, len(groups), tokens)
    token_T = rng.integers(0, 50, tokens) + 100 * modality_T
    first_null = np.cumsum([placement.num_experts, *(group.num_null for group in groups)])
    frames, ids_TLK = [], np.zeros((0, layers, 1), np.int16)
    for step in range(1, steps + 1):
        ids_TLK = np.full((tokens, layers, max(group.top_k for group in groups)), -1, np.int16)
        for g, group in enumerate(groups):
            preference_LC = rng.normal(0, 0.1, (layers, group.num_columns))
            bias(preference_LC, g)
            columns = np.r_[np.array(group.experts), first_null[g] + np.arange(group.num_null)]
            rows = np.flatnonzero(modality_T == g)
            for layer in range(layers):
                noisy_TC = preference_LC[layer] + rng.gumbel(size=(len(rows), group.num_columns))
                ids_TLK[rows, layer, : group.top_k] = columns[np.argsort(-noisy_TC, axis=1)[:, : group.top_k]]
        counts = [np.bincount(ids_TLK[:, layer].ravel() + 1, minlength=first_null[-1] + 1)[1:] for layer in range(layers)]
        tokens_LG = np.tile(np.bincount(modality_T, minlength=len(groups)), (layers, 1))
        frames.append(Frame(step, step, np.stack(counts), tokens_LG, np.zeros_like(tokens_LG), np.zeros(len(groups))))
    return Routing(
        name="runs/made <b>", source="made up", placement=placement, layers=tuple(range(1, layers + 1)),
        modalities=tuple(name for group in groups for name in group.modalities), frames=tuple(frames),
        window=total(frames), window_steps=steps, configuration=CONFIGURATION, balance_coefficient=0.01,
        tokens=Tokens(
            token_T,
            modality_T,
            np.arange(tokens) // 30,
            np.arange(tokens) % 30,
            ids_TLK,
            (steps,),
            steps,
            "held-out",
            name_of=lambda token: WORDS[token % 10] if token < 100 else None,
            picture_of=lambda token: np.full((4, 4, 3), token, np.uint8) if token >= 100 else None,
        ),
    )  # fmt: skip
