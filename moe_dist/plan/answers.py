"""Describes the layouts that `moe-dist plan` has estimated, in sentences and as a picture. Imports no torch."""

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.estimate import Estimate, LayoutEstimator
from moe_dist.plan.layouts import Placements
from moe_dist.plan.policies import expert_groups
from moe_dist.plan.rates import Rates
from moe_dist.plan.rows import Expected, crossing_groups
from moe_dist.plan.solver import rank_loads

PARTS = (("busy", "#4c78a8"), ("imbalance", "#e45756"), ("exchange", "#f58518"), ("tail", "#72b7b2"))
WORDS = {
    "busy": "the mean rank computes, or syncs",
    "imbalance": "waiting for the busiest rank",
    "exchange": "exchanges, not covered",
    "tail": "sums, gathers, optimizer, not covered",
}


def best_of_each(ranked: Sequence[Any], key: Callable[[Any], object]) -> list[Any]:
    """Returns, for each value of `key`, the first layout in `ranked` for which `key` has this value."""
    best: dict[object, Any] = {}
    for each in ranked:
        best.setdefault(key(each), each)
    return list(best.values())


def answers(best: Estimate, fitting: Sequence[Estimate], rates: Rates) -> Iterator[str]:
    """Yields sentences that compare the best layout with the best one for each other value of a choice, on as many GPUs."""
    same = sorted((each for each in fitting if each.gpus == best.gpus), key=lambda each: each.seconds)
    if crossing := crossing_groups(best.config.parallel.ep, best.config.parallel.edp, rates.ranks_per_node):
        groups = _named_groups(crossing, best.config.parallel.edp)
        yield f"The best layout sends {best.bytes_between / 1e9:,.3g} GB a step between nodes ({groups})."

    def rivals(choice: Callable[[Estimate], object]) -> list[Estimate]:
        return [each for each in best_of_each(same, choice) if choice(each) != choice(best)]

    for each in sorted(rivals(lambda e: e.config.parallel.ep), key=lambda e: e.config.parallel.ep):
        ep, edp, node = each.config.parallel.ep, each.config.parallel.edp, rates.ranks_per_node
        where = "stays in the node"
        if crossing := crossing_groups(ep, edp, node):
            where = f"sends {each.bytes_between / 1e9:,.3g} GB a step between nodes ({_named_groups(crossing, edp)})"
        yield (
            f"EP {ep} {where}: {each.exchange / each.seconds:.0%} of its step is exchange and "
            f"{each.tail / each.seconds:.0%} gathers, sums and optimizer; EP {best.config.parallel.ep} with edp "
            f"{best.config.parallel.edp} is {each.seconds / best.seconds:.2f}x as fast."
        )
    choices: tuple[tuple[str, Callable[[Estimate], object]], ...] = (
        ("placement.policy", lambda e: e.config.placement.policy),
        ("parallel.dispatch.kind", lambda e: e.config.parallel.dispatch.kind),
        ("parallel.recompute", lambda e: e.config.parallel.recompute),
        ("parallel.data", lambda e: e.config.parallel.data),
        ("train.micro_batch", lambda e: e.config.train.micro_batch),
    )
    for key, choice in choices:
        for each in rivals(choice):
            yield (
                f"{key}={choice(best)} instead of {choice(each)}: {each.seconds / best.seconds:.2f}x as fast; the best "
                f"step with {choice(each)} takes {each.seconds:.3g} s, {each.exchange / each.seconds:.0%} of it exchange."
            )


def _named_groups(crossing: Sequence[int], edp: int) -> str:
    if len(crossing) == edp:
        return "all EP groups cross nodes"
    more = ", ..." if len(crossing) > 6 else ""
    return f"EP groups {', '.join(map(str, crossing[:6]))}{more} cross nodes: {len(crossing)} of {edp}"


def modality_answer(fitting: Sequence[Estimate], planner: LayoutEstimator) -> str:
    """Returns a sentence about the best pinned layout. It names the token shares of the second group's modality at which
    this layout is faster than with interleaved experts. Empty if there are no pinned layouts of two groups."""
    pinned = [each for each in fitting if each.config.placement.policy == "pinned" and not is_interleaved(each.placement)]
    if not pinned or len(pinned[0].placement.groups) != 2:
        return ""
    config = min(pinned, key=lambda each: each.seconds).config
    groups = expert_groups(config.model.moe)
    name, other, gains = groups[1].modalities[0], groups[0].modalities[0], []
    shares = np.arange(0.05, 1.0, 0.05).round(2)
    # A pinned placement is made once, for the data's token mix, because a run cannot change it if the mix drifts.
    sections = Placements(config, planner.token_mix).of(config.parallel.ep)
    for share in shares:
        mix = {name: round(1e6 * share), other: round(1e6 * (1 - share))}
        each = LayoutEstimator(planner.rates, Expected(mix), mix, planner.most_bytes)
        seconds = [
            each.estimate(config.model_copy(update={"placement": section}), placement).seconds
            for section, placement in sections
        ]
        gains.append(seconds[0] / seconds[1])
    wins = [f"{share:g}" for share, gain in zip(shares, gains, strict=True) if gain > 1]
    best_at = int(np.argmax(gains))
    if not wins:
        return (
            f"pinned, with ranks for this mix, never wins at EP {config.parallel.ep} and {name} shares of 0.05 to 0.95; "
            f"at best, at {shares[best_at]:g}, it takes {1 / gains[best_at]:.2f}x as long, since ranks wait for others."
        )
    return (
        f"pinned, with ranks for this mix, is faster than interleaved at {name} shares of {wins[0]} to {wins[-1]} (best "
        f"at {shares[best_at]:g}: {gains[best_at]:.2f}x), and slower elsewhere, since ranks wait for the busier modality."
    )


def is_interleaved(placement: ExpertPlacement) -> bool:
    """Returns whether a placement equals the interleaved placement, which other policies can also produce."""
    return placement.slots == ExpertPlacement.interleaved(placement.groups, placement.num_ranks).slots


def hot_expert(load_LE: np.ndarray, layers: Sequence[int], placement: ExpertPlacement) -> str:
    """Returns a sentence about the overloaded expert (and its layer) that adds most to the busiest ranks' work."""
    rank_E, ranks = np.array(placement.rank_of_expert), placement.num_ranks
    work_LR = rank_loads(load_LE, rank_E, ranks)
    pace, worst = work_LR.max(1).sum(), (0.0, 0, 0)
    for layer, expert in np.ndindex(*load_LE.shape):
        work_R = work_LR[layer].copy()
        work_R[rank_E[expert]] -= max(0.0, load_LE[layer, expert] - load_LE[layer].mean())
        worst = max(worst, (float(work_LR[layer].max() - work_R.max()), layer, expert))
    excess, layer, expert = worst
    if excess <= 0.0 or ranks == 1:
        return ""
    return (
        f"expert {placement.name_of(expert)} of layer {layers[layer]} alone makes {excess / pace:.1%} of the busiest "
        f"ranks' expert work at EP {ranks}: it has {load_LE[layer, expert] / load_LE[layer].mean():.1f}x the mean load."
    )


def picture(shown: Sequence[Estimate], title: str) -> str:
    """Returns an SVG in which a bar for each layout shows the seconds of the parts of its step."""
    width, left, top, row = 1260, 640, 64, 24
    longest = max(each.seconds for each in shown)
    parts = [f'<text x="8" y="20" font-weight="bold">{escape(title)}</text>']
    for i, (name, colour) in enumerate(PARTS):
        parts.append(f'<rect x="{8 + 290 * i}" y="32" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{25 + 290 * i}" y="43">{WORDS[name]}</text>')
    for i, each in enumerate(shown):
        y, x = top + row * i, float(left)
        parts.append(
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(f"{each.gpus} GPUs: {each.name}")}</text>'
        )
        for name, colour in PARTS:
            long = max(0.0, getattr(each, name)) / longest * (width - left - 150)
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{long:.1f}" height="18" fill="{colour}"/>')
            x += long
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{each.seconds:.3g} s, {each.mark}</text>')
    height = top + row * len(shown) + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
