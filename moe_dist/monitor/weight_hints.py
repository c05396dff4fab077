"""Makes hints from measured weights, updates and gradients. All rules are pure functions over the last measured steps.

Shape letters: N tensors, X elements of a sketch, n experts of one group in one layer.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from moe_dist.monitor.metrics import Record, divide
from moe_dist.monitor.routing_hints import ENOUGH, Hint, named_few
from moe_dist.monitor.statistics import WeightTable
from moe_dist.placement.parameter_names import ADAPTERS, EXPERTS, ROUTERS, Role, role_of_name
from moe_dist.placement.placement import ExpertGroup

# Limits of norm of the update / norm of the weight. A norm's weights are near 1, so that their ratio is the learning rate.
LARGE, LARGE_NORMS, SMALL = 0.1, 0.015, 1e-6
MATRICES = ("attention", "dense", "experts")  # adapters and routers may begin at zero, where any update is large
SCALE, NOISY = math.log(4.0), 8.0  # an expert has a scale of its own if it is 4 times, and 8 MADs, from the median expert
TWINS, UNLIKE = 0.95, 0.5  # cosine of equal experts; the median pair's cosine must be below the second number


class Place(NamedTuple):
    """Where a tensor is: part of the model, layer (-1 outside the layers), and for experts group and index in the group."""

    part: str
    layer: int = -1
    group: str = ""
    expert: int = -1


@cache
def place_of(name: str, groups: tuple[str, ...]) -> Place:
    """Returns the place of a tensor, as hints name it. `groups` are the names of the expert groups."""
    role, found = role_of_name(name), re.search(r"layers\.(\d+)\.", name)
    layer = int(found[1]) if found else -1
    if role in EXPERTS:
        *before, expert, _ = name.split(".")
        group = next((each for each in before[::-1][:2] if each in groups), "")
        return Place("experts" if role is Role.EXPERT else "adapters", layer, group, int(expert))
    if role is Role.DENSE:
        # Names of transformers: rows of an embedding get a gradient only for their tokens, an encoder only with pictures.
        if re.search(r"\.(embed_tokens|pos_embed|wte|visual|vision_\w+)\.", name):
            return Place("embedding", layer)
        return Place("attention" if re.search(r"\.(self_)?att(ention|n)\.", name) else "dense", layer)
    part = "routers" if role in ROUTERS else "adapters" if role in ADAPTERS else role.value + "s" * (role is Role.NORM)
    return Place(part, layer)


def update_ratios(table: WeightTable) -> dict[str, float]:
    """Returns norm of the update / norm of the weight, by part of the model: the median over its tensors."""
    ratio_N = np.sqrt(divide(table.squares_N3[:, 1], table.squares_N3[:, 0]))
    parts = np.array([place_of(name, ()).part for name in table.names])
    known = {part: ratio_N[(parts == part) & np.isfinite(ratio_N)] for part in dict.fromkeys(parts.tolist())}
    return {part: float(np.median(ratios)) for part, ratios in known.items() if ratios.size}


def matrix_ratio(table: WeightTable | None) -> float:
    """Returns the median of `update_ratios` over the parts with matrices; nan without such parts."""
    ratios = [ratio for part, ratio in update_ratios(table).items() if part in MATRICES] if table else []
    return float(np.median(ratios)) if ratios else math.nan


def weight_hints(records: Sequence[Record], groups: Sequence[ExpertGroup], moe_layers: Sequence[int]) -> Iterator[Hint]:
    """Yields the hints of all rules. `records` are those of the last two steps with `Record.weights`."""
    table = records[-1].weights
    if table is None or not np.isfinite(table.squares_N3).all():
        return
    places = [place_of(name, tuple(group.name for group in groups)) for name in table.names]
    if records[-1].scalars["optim/lr"]:
        yield from update_sizes(table)
        if len(records) > 1:
            yield from untrained(records, places, groups, moe_layers)
    # Norms that multiply by 1 + weight begin with 0, but their first updates change it.
    weight_N = table.squares_N3[:, 0]
    named = zip(table.names, places, weight_N, strict=True)
    norms = [place for name, place, square in named if not square and re.search(r"norm\w*\.weight$", name)]
    if norms:
        yield Hint(
            "zero/norms",
            f"the weight of a norm is 0 in {_where(norms)}, so that nothing behind it learns; look at how it was set or "
            "loaded: some families store this weight minus 1",
        )
    members: dict[Place, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # bank -> expert -> its tensors
    for row, place in enumerate(places):
        if place.part == "experts" and "bias" not in table.names[row]:
            members[place._replace(expert=-1)][place.expert].append(row)
    found = [*own_scale(table, members), *twins(table, members)]
    yield from found
    known = {hint.kind for hint in found}  # a cause, which the output only shows again
    yield from (each for each in own_output(table, groups, moe_layers) if each.kind.replace("_output", "") not in known)


def update_sizes(table: WeightTable) -> Iterator[Hint]:
    """Warns if the updates are so large that they replace the weights in a few steps, or too small to change them."""
    ratios = update_ratios(table)
    large = matrix_ratio(table) >= LARGE or ratios.get("norms", 0.0) >= LARGE_NORMS
    told = ", ".join(f"{part} {ratio:.2g}" for part, ratio in ratios.items())
    if large:
        yield Hint(
            "update",
            f"the learning rate is too high: one update is a large part of the weights ({told}; usual: below 0.05, norms "
            "below 0.005); see optim/lr; try an optimizer.lr that is ten times lower, or a longer warm-up",
        )
    elif matrix_ratio(table) < SMALL:
        yield Hint(
            "update",
            f"the learning rate is too low: an update hardly changes the weights ({told} of their norm); see optim/lr; try "
            "a higher optimizer.lr",
        )


def untrained(
    records: Sequence[Record], places: Sequence[Place], groups: Sequence[ExpertGroup], moe_layers: Sequence[int]
) -> Iterator[Hint]:
    """Warns about tensors that got no gradient, or that did not change although they got one, in both measured steps."""
    tables = [record.weights for record in records if record.weights is not None]
    if len({table.names for table in tables}) > 1:
        return
    choices_LC = np.min([record.arrays["choices_LC"] for record in records], axis=0)
    column = {(group.name, e - group.first_expert): e for group in groups for e in group.experts}
    routed = any(group.num_columns > group.top_k for group in groups)  # else routers have nothing to decide
    tokens = min(int(record.arrays["tokens_LG"].min(initial=ENOUGH)) for record in records)
    routed = routed and tokens >= ENOUGH  # the router of a group without tokens gets no gradient

    def judged(place: Place) -> bool:
        if place.expert < 0:
            return place.part not in ("embedding", "zero_computation") and (routed or place.part != "routers")
        at = column.get((place.group, place.expert))
        return at is not None and place.layer in moe_layers and choices_LC[moe_layers.index(place.layer), at] >= ENOUGH

    weight_N, update_N, gradient_N = np.max([table.squares_N3 for table in tables], axis=0).T
    no_gradient = ("no gradient reaches the", gradient_N == 0, "does detach cut them off, or is an output zero?")
    no_change = ("updates do not change the", (gradient_N > 0) & (update_N == 0) & (weight_N > 0), "does the optimizer "
                 "have them, and is optimizer.lr large enough for their number format?")  # fmt: skip
    for kind, (what, found_N, advice) in {"untrained": no_gradient, "unchanged": no_change}.items():
        by_part: dict[str, list[Place]] = defaultdict(list)
        for place in (places[row] for row in np.flatnonzero(found_N).tolist()):
            if judged(place):
                by_part[place.part].append(place)
        for part, found in by_part.items():
            yield Hint(
                f"{kind}/{part}",
                f"{what} {part} of {_where(found)} in steps {records[0].step} and {records[-1].step}, though the run "
                f"trains them; see updates in metrics.jsonl; {advice}",
            )


def own_scale(table: WeightTable, members: dict[Place, dict[int, list[int]]]) -> Iterator[Hint]:
    """Warns about experts whose output is zero, and about experts whose weights have a scale of their own."""
    zero, odd = list[Place](), list[tuple[float, Place]]()
    for bank, rows_of in members.items():
        square_nT = np.array([table.squares_N3[rows, 0] for rows in rows_of.values()])
        zero += [bank._replace(expert=e) for e, squares in zip(rows_of, square_nT, strict=True) if not squares.all()]
        log_nT = np.log(square_nT[square_nT.all(1)]) / 2
        if len(log_nT) < 4:
            continue
        off_nT = log_nT - np.median(log_nT, axis=0)
        limit_T = np.maximum(SCALE, NOISY * 1.4826 * np.median(np.abs(off_nT), axis=0))
        experts = [e for e, squares in zip(rows_of, square_nT, strict=True) if squares.all()]
        for expert, off_T in zip(experts, off_nT, strict=True):
            if (np.abs(off_T) > limit_T).any():
                odd.append((math.exp(off_T[np.abs(off_T).argmax()]), bank._replace(expert=expert)))
    if zero:
        yield Hint(
            "zero",
            f"the output of experts is zero, because a matrix of theirs is zero: {_where(zero)}; they compute nothing, and "
            "learn slowly or never; look at how these weights were set or loaded",
        )
    if odd:
        factor, place = max(odd, key=lambda each: abs(math.log(each[0])))
        yield Hint(
            "scale",
            f"experts have a scale of their own: {_where([each for _, each in odd])}; the weights of expert {place.expert} "
            f"in layer {place.layer} are {factor:.2g} x those of the median expert of its group; look at how these weights "
            "were set or loaded, and at optimizer.lr",
        )


def own_output(table: WeightTable, groups: Sequence[ExpertGroup], moe_layers: Sequence[int]) -> Iterator[Hint]:
    """Warns about experts whose output is zero for all tokens, though their weights are not."""
    zero = list[Place]()
    for layer, sums_E2 in zip(moe_layers, table.outputs_LE2, strict=False):
        for group in groups:
            square_n, pairs_n = sums_E2[group.experts].T
            found = np.flatnonzero((pairs_n >= ENOUGH) & (square_n == 0)).tolist()
            zero += [Place("experts", layer, group.name, expert) for expert in found]
    if zero:
        yield Hint(
            "zero_output",
            f"the output of experts is zero for all tokens, though their weights are not: {_where(zero)}; they add nothing "
            "to their layer; look at what is done with their output, and at their activations: do they saturate?",
        )


def twins(table: WeightTable, members: dict[Place, dict[int, list[int]]]) -> Iterator[Hint]:
    """Warns about two experts with equal weights in a layer whose other experts differ."""
    for bank, rows_of in members.items():
        experts = np.array([*rows_of])
        parts_nTX = np.array([table.sketch_NX[rows] for rows in rows_of.values()])
        norm_nT1 = np.linalg.norm(parts_nTX, axis=2, keepdims=True)
        unit_nX = np.nan_to_num(divide(parts_nTX, norm_nT1)).reshape(len(experts), -1) / math.sqrt(parts_nTX.shape[1])
        cosines = np.triu(unit_nX @ unit_nX.T, 1)
        pairs = np.argwhere(cosines >= TWINS)
        others = cosines[np.triu_indices(len(experts), 1)]
        if len(pairs) and len(experts) > 2 and np.median(others) < UNLIKE:
            one, two = experts[pairs[0]].tolist()
            yield Hint(
                "twins",
                f"{bank.group} experts {one} and {two} of layer {bank.layer} have the same weights (cosine "
                f"{cosines[tuple(pairs[0])]:.3f}; median pair: {np.median(others):.2f}), so that one of them is spent in "
                "vain; were they copied? if so, add noise to one of them",
            )
            return


def _where(places: Sequence[Place]) -> str:
    """Returns the layers, and the groups and numbers of experts, of some places."""
    layers = sorted({place.layer for place in places})
    if places[0].expert < 0:
        names = named_few([str(layer) for layer in layers if layer >= 0])
        return f"layer{'s' * (len(layers) > 1)} {names}" if names else "the model"
    by_layer = {layer: sorted({(p.group, str(p.expert)) for p in places if p.layer == layer}) for layer in layers}
    named = {layer: named_few([" ".join(each).strip() for each in found]) for layer, found in by_layer.items()}
    return named_few([f"layer {layer} ({experts})" for layer, experts in named.items()])
