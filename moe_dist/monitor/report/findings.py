"""Makes the first lines of a routing report. These sentences name the faults that the rules of hints find, then the largest
loads.

Shape letters are as in `metrics.py`.
"""

import math
import re
from collections.abc import Iterator

import numpy as np

from moe_dist.monitor.hints import busy_rank
from moe_dist.monitor.metrics import divide, group_choices, group_metrics, rows_by_rank, weighted_rows
from moe_dist.monitor.pictures import over_mean
from moe_dist.monitor.report.routing import Routing, total
from moe_dist.monitor.routing_hints import ENOUGH, IDLE, WindowSums, busy_text, for_another_trainer, routing_hints

NAMED = 6  # largest number of dead experts that a line of the report names


def problems(routing: Routing) -> list[str]:
    """Returns the faults that the rules of hints find in the last recorded steps. Returns [] for a healthy run."""
    window = routing.window
    sums = WindowSums(*window[2:5], steps=routing.window_steps, balance_coefficient=routing.balance_coefficient)
    found = [*routing_hints(sums, routing.groups, routing.layers), *busy_rank(work_of_ranks(routing))]
    texts = [re.sub(r"; see [^;]*", "", hint.text) for hint in found]  # removes references to TensorBoard
    texts += _starved_modalities(routing)
    texts = [text.replace("in the last 1 steps", "in this step") for text in texts]
    if math.isnan(routing.balance_coefficient):
        texts = [text.replace(" (now nan)", "") for text in texts]
    if not routing.configuration or "attached" in routing.configuration:
        texts = [for_another_trainer(text) for text in texts]
    return [f"{text if '.' in text.split()[0] else text[0].upper() + text[1:]}." for text in texts]  # keys keep their case


def tiles(routing: Routing) -> list[tuple[str, str]]:
    """Returns four figures of the last recorded steps, each with its words, or [] if no token was routed."""
    window, parts = routing.window, group_choices(routing.window.choices_LC, routing.groups)
    tokens, dropped = window.tokens_LG.sum(), window.dropped_LG.sum()
    if not tokens:
        return []
    pairs, nulls, choices = (
        sum(int(getattr(part, name).sum()) for part in parts) for name in ("true_Ln", "null_Lm", "total")
    )
    work_R = work_of_ranks(routing).sum(0)
    return [
        (f"{(pairs - dropped) / tokens:.2f}", "true experts a token and layer"),
        (f"{nulls / max(choices, 1):.0%}", "of the choices are null"),
        (f"{work_R.max() / (work_R.mean() or 1):.2f} x", "the mean work on the busiest rank"),
        (f"{dropped / max(pairs, 1):.1%}", "of the (token, expert) pairs are dropped"),
    ]


def facts(routing: Routing) -> list[str]:
    """Returns sentences about the busiest expert, layer and rank, about overflow, dead experts and null choices."""
    return [*_busiest(routing), *_capacity(routing), *_dead(routing), *_nulls(routing)]


def work_of_ranks(routing: Routing) -> np.ndarray:
    """Returns the expert work in the window of steps, by layer and EP rank, float64 [L, R]. The work for one (token,
    expert) pair is the FFN width of the expert."""
    window, placement = routing.window, routing.placement
    choices_LC = window.choices_LC.astype(np.float64)
    for g, part in enumerate(group_choices(window.choices_LC, routing.groups)):
        kept_L = 1 - np.nan_to_num(divide(window.dropped_LG[:, g], part.true_Ln.sum(1)))  # assumes evenly spread drops
        choices_LC[:, routing.groups[g].experts] *= kept_L[:, None]
    return weighted_rows(choices_LC, rows_by_rank(choices_LC, placement), placement)


def dead_experts(routing: Routing) -> list[tuple[int, int]]:
    """Returns (index of the layer, logical expert) for each expert that no token chose in the window. If a layer has fewer
    than ENOUGH choices per expert, none of its experts counts as dead, because an expert may then have no tokens by
    chance."""
    found = []
    for group, part in zip(routing.groups, group_choices(routing.window.choices_LC, routing.groups), strict=True):
        dead = np.argwhere((part.true_Ln == 0) & (part.true_Ln.mean(1, keepdims=True) >= ENOUGH))
        found += [(layer, group.first_expert + expert) for layer, expert in dead.tolist()]
    return sorted(found)


def too_few(routing: Routing) -> tuple[int, str]:
    """Returns the number of (layer, expert) pairs that no rule judges, because their layer has fewer than ENOUGH choices
    per expert. Also returns a clause with this number, which is empty if all pairs are judged."""
    loads = [part.true_Ln for part in group_choices(routing.window.choices_LC, routing.groups)]
    few = np.concatenate([true_Ln[true_Ln.mean(1) < ENOUGH].ravel() for true_Ln in loads])
    if not few.size:
        return 0, ""
    cells, idle = sum(true_Ln.size for true_Ln in loads), int((few == 0).sum())
    clause = f"too few choices to judge {few.size:,} of {cells:,} (layer, expert) pairs (fewer than {ENOUGH:.0f} an expert)"
    return few.size, clause + f": no token took {idle:,} of these" * (idle > 0)


def _starved_modalities(routing: Routing) -> Iterator[str]:
    """Names modalities whose tokens take hardly any true expert although the tokens of other modalities in the same group
    do. Hints only judge a whole group, because only a trace has the modality of each choice."""
    tokens = routing.tokens
    if tokens is None:
        return
    taken_T = ((tokens.ids_TLK >= 0) & (tokens.ids_TLK < routing.placement.num_experts)).sum((1, 2))
    taken_M = [taken_T[tokens.modality_T == m] / len(routing.layers) for m in range(len(routing.modalities))]
    for group in routing.groups:
        even = group.expected_experts_per_token
        taken = {name: of for name, of in zip(routing.modalities, taken_M, strict=True) if name in group.modalities}
        judged = {name: of.mean() for name, of in taken.items() if even * len(of) * len(routing.layers) >= ENOUGH}
        fed = {name: mean for name, mean in judged.items() if mean >= IDLE * even}
        for name in sorted(judged.keys() - fed.keys()) if fed else ():
            others = ", ".join(f"{mean:.2f} of {other}" for other, mean in fed.items())
            yield (
                f"{name} tokens of the {group.name} group take {judged[name]:.2f} true experts a layer, but {others} "
                f"tokens (even: {even:.2f}), in the trace of {tokens.split} tokens; try a larger coefficient in "
                f"loss.balance.schedule, or a group for {name} alone in model.moe.groups"
            )


def _busiest(routing: Routing) -> Iterator[str]:
    window = routing.window
    best, evenness_L = (0.0, ""), np.zeros(len(routing.layers))
    for g, (group, part) in enumerate(zip(routing.groups, group_choices(window.choices_LC, routing.groups), strict=True)):
        over_Ln = np.nan_to_num(over_mean(part.true_Ln))
        evenness_L = np.maximum(evenness_L, over_Ln.max(1))
        layer, expert = np.unravel_index(over_Ln.argmax(), over_Ln.shape)
        if over_Ln[layer, expert] > best[0]:
            text = busy_text(group, part.true_Ln, window.tokens_LG[:, g], routing.layers, int(layer), int(expert))
            best = (float(over_Ln[layer, expert]), f"Busiest expert: {text}.")
    if not best[1]:
        yield "No token took a true expert in these steps."
        return
    yield best[1]
    layer = int(evenness_L.argmax())
    yield (
        f"Least even layer: layer {routing.layers[layer]}, whose busiest expert takes {evenness_L[layer]:.2f} x the mean "
        f"expert (mean over layers: {evenness_L.mean():.2f} x)."
    )
    work_R = work_of_ranks(routing).sum(0)
    if len(work_R) > 1 and work_R.any():
        rank = int(work_R.argmax())
        over = work_R[rank] / work_R.mean()
        yield f"Busiest rank: rank {rank} of {len(work_R)} computes {over:.2f} x the mean rank's pairs x FFN width."
    elif work_R.any():
        yield "Busiest rank: one rank holds all experts."


def _capacity(routing: Routing) -> Iterator[str]:
    window = routing.window
    metrics = group_metrics(window.choices_LC, window.tokens_LG, routing.groups)
    used_LG = np.nan_to_num(metrics["capacity_used"])
    pairs_L = window.choices_LC[:, : routing.placement.num_experts].sum(1)
    layer, group = (int(i) for i in np.unravel_index(used_LG.argmax(), used_LG.shape))
    most = (
        f"the busiest expert (layer {routing.layers[layer]}, {routing.groups[group].name}) takes {used_LG.max():.2f} x an "
        "even share of all choices"
    )
    dropped, pairs = int(window.dropped_LG.sum()), int(pairs_L.sum())
    if dropped:
        share_L = divide(window.dropped_LG.sum(1), pairs_L)
        worst = int(np.nan_to_num(share_L).argmax())
        yield (
            f"Capacity overflow: {dropped / pairs:.0%} of the (token, expert) pairs were dropped, {share_L[worst]:.0%} in "
            f"layer {routing.layers[worst]}; {most}."
        )
    else:
        yield f"Capacity overflow: no pair was dropped; {most}."
    whole = total(routing.frames)
    if whole.needed_G.any():
        group, most = routing.groups[int(whole.needed_G.argmax())], float(whole.needed_G.max())
        yield (
            f"Capacity factor: in a micro-batch of a rank in {whole.words}, an expert ({group.name}) takes {most:.2f} x an "
            f"even share at most, so model.moe.capacity.factor={math.ceil(100 * most) / 100:.2f} drops nothing."
        )


def _dead(routing: Routing) -> Iterator[str]:
    dead, (unjudged, few) = dead_experts(routing), too_few(routing)
    cells = len(routing.layers) * routing.placement.num_experts - unjudged
    names = [f"layer {routing.layers[layer]} {routing.placement.name_of(expert)}" for layer, expert in dead[:NAMED]]
    more = f" and {len(dead) - NAMED} more" if len(dead) > NAMED else ""
    told = f"none of {cells:,} (layer, expert) pairs" if cells else ""
    if dead:
        told = f"no token took {len(dead):,} of {cells:,} (layer, expert) pairs: {', '.join(names)}{more}"
    yield f"Dead experts: {'; '.join(filter(None, (told, few)))}."


def _nulls(routing: Routing) -> Iterator[str]:
    window = routing.window
    parts = group_choices(window.choices_LC, routing.groups)
    for g, (group, part) in enumerate(zip(routing.groups, parts, strict=True)):
        tokens, choices = int(window.tokens_LG[:, g].sum()), int(part.total.sum())
        if not tokens:
            yield f"Group {group.name}: no token."
            continue
        experts = (part.true_Ln.sum() - window.dropped_LG[:, g].sum()) / tokens
        text = f"Group {group.name}: a token takes {experts:.2f} true experts a layer"
        if group.num_null:
            even = group.num_null / group.num_columns
            text += f"; {part.null_Lm.sum() / choices:.0%} of its choices are null (even: {even:.0%})"
        yield f"{text}."
