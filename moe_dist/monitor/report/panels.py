"""Defines the panels of a report. Each panel is a function that makes HTML from a `Subject`, and has one line in PANELS. A
panel without data returns a sentence with the reason.

Shape letters: L MoE layers, G groups, T tokens, n true experts of a group, E true experts, C columns, R ranks, F frames.
"""

from collections.abc import Callable

import numpy as np

from moe_dist.monitor.heatmaps import Axis, linear_scale, ratio_scale
from moe_dist.monitor.metrics import group_choices, group_metrics
from moe_dist.monitor.pictures import loads, over_mean
from moe_dist.monitor.report import numbers
from moe_dist.monitor.report.drawing import bars, curves, details, heat, slider, table
from moe_dist.monitor.report.findings import dead_experts, too_few, work_of_ranks
from moe_dist.monitor.report.routing import Frame, Routing, Subject, merged
from moe_dist.monitor.report.token_panels import coactivation, compute_maps, experts_a_token, ledger, specialisation
from moe_dist.monitor.trace.reader import count_choices
from moe_dist.placement.replica_slots import PlacementWithReplicas


def load(subject: Subject) -> str:
    """Shows heat maps of load / mean load over layers and experts, one per group, with a slider over the steps."""
    routing = subject.routing
    scale = ratio_scale("load of an expert / mean load of its group in the layer: 1 is even")
    several = routing.placement.num_ranks > 1

    def frame(frame: Frame) -> str:
        maps = []
        for group, load_Ln in loads(frame.choices_LC, routing.groups):
            ranks = tuple(f"r{routing.placement.rank_of_expert[e]}" for e in group.experts) if several else ()
            name = "expert, and the rank that holds it" if several else "expert"
            columns = Axis(name, [str(i) for i in range(group.num_experts)], ranks)
            maps.append(heat(load_Ln, routing.layer_axis, columns, scale=scale, title=f"Group {group.name}."))
        return "".join(maps)

    return slider([(each.label, frame(each)) for each in merged(routing.frames, subject.slides)], legend="Steps")


def ranks(subject: Subject) -> str:
    """Shows a heat map of each rank's work (pairs x FFN width) in each layer, and a table of experts' replicas."""
    work_LR = work_of_ranks(subject.routing)
    if work_LR.shape[1] == 1:
        return "<p>One rank holds all experts, so that no rank waits.</p>"
    columns = Axis("rank of the EP group", [str(rank) for rank in range(work_LR.shape[1])])
    scale = ratio_scale("pairs x FFN width of a rank / mean of the ranks: the others wait for the busiest rank")
    drawn = heat(over_mean(work_LR), subject.routing.layer_axis, columns, scale=scale, title="Work of the ranks.")
    return drawn + _replicas(subject.routing)


def _replicas(routing: Routing) -> str:
    """Returns a table of those experts that have replicas; empty if there are none."""
    placement = routing.placement
    if not isinstance(placement, PlacementWithReplicas):
        return ""
    rows = [
        (str(routing.layers[layer]), placement.name_of(expert), str(hosts[-1]), ", ".join(map(str, hosts[:-1])))
        for layer in range(len(routing.layers))
        for expert, hosts in placement.hosts(layer).items()
    ]
    caption = "Replicas at the last traced step. A rank with a replica keeps its tokens; the others take turns."
    return table(("layer", "expert", "its rank", "ranks of its replicas"), rows, caption=caption) if rows else ""


def percentiles(subject: Subject) -> str:
    """Shows curves of the percentiles of load / mean load, taken over all layers and experts."""
    routing, pictures = subject.routing, []
    by_frame = [dict(loads(frame.choices_LC, routing.groups)) for frame in routing.frames]
    for group in routing.groups:
        lines = {f"p{p}": [_percentile(load_Ln[group], p) for load_Ln in by_frame] for p in (50, 75, 90, 99)}
        pictures.append(
            curves(
                lines,
                _at(routing),
                title=f"Group {group.name}.",
                x="step",
                y="Load / mean load, over layers and experts.",
                top=2,
            )
        )
    return "".join(pictures)


def concentration(subject: Subject) -> str:
    """Shows Lorenz curves and Gini coefficients."""
    routing = subject.routing
    parts = group_choices(routing.window.choices_LC, routing.groups)
    pictures, rows = [], []
    for group, part in zip(routing.groups, parts, strict=True):
        curve = numbers.lorenz(part.true_Ln.astype(np.float64))
        gini_L = numbers.gini(part.true_Ln.astype(np.float64))
        if np.isnan(gini_L).all():
            continue
        at = np.linspace(0, 1, group.num_experts + 1).tolist()
        worst = int(np.nanargmax(gini_L))
        lines = {"even": at, "mean layer": np.nanmean(curve, axis=0), f"layer {routing.layers[worst]}": curve[worst]}
        words = f"Load that the least loaded share of the experts has. Gini {np.nanmean(gini_L):.2f} in the mean layer."
        pictures.append(curves(lines, at, title=f"Group {group.name}.", x="share of the experts", y=words, top=1))
        rows += [[group.name, str(layer), f"{value:.3f}"] for layer, value in zip(routing.layers, gini_L, strict=True)]
    gini_table = table(
        ("group", "layer", "Gini"), rows, caption="Gini coefficient: 0 is even, 1 - 1/n if one expert has all."
    )
    return "".join(pictures) + details("Gini coefficient of each layer", gini_table)


def dead(subject: Subject) -> str:
    """Shows a table of the experts that no token took. For each it has the last frame in which a token took the expert."""
    routing, rows = subject.routing, []
    unjudged, few = too_few(routing)
    few = f"<p>{few[0].upper()}{few[1:]}.</p>" if few else ""
    if unjudged == len(routing.layers) * routing.placement.num_experts:
        return few
    for layer, expert in dead_experts(routing):
        alive = [frame.label for frame in routing.frames if frame.choices_LC[layer, expert]]
        rows.append((str(routing.layers[layer]), routing.placement.name_of(expert), alive[-1] if alive else "never"))
    if not rows:
        return f"{few}<p>Every {'other ' * bool(few)}expert was taken in every layer in {routing.window.words}.</p>"
    few += f"<p>The first 200 of {len(rows)}.</p>" if len(rows) > 200 else ""
    return few + table(("layer", "expert", "last steps with a token"), rows[:200], caption="Experts that no token took.")


def capacity(subject: Subject) -> str:
    """Shows curves of the dropped fraction, and a heat map of the busiest expert's load / the even load."""
    routing, window = subject.routing, subject.routing.window
    used_LG = group_metrics(window.choices_LC, window.tokens_LG, routing.groups)["capacity_used"]
    lines = {}
    for g, group in enumerate(routing.groups):
        true = [group_choices(frame.choices_LC, routing.groups)[g].true_Ln.sum() for frame in routing.frames]
        lines[group.name] = [
            frame.dropped_LG[:, g].sum() / pairs if pairs else np.nan
            for frame, pairs in zip(routing.frames, true, strict=True)
        ]
    dropped = curves(lines, _at(routing), title="Dropped.", x="step", y="Share of the (token, expert) pairs.", top=0.1)
    scale = linear_scale(
        "load of the busiest expert / even share of all choices", max(2.0, float(np.nan_to_num(used_LG).max()))
    )
    return dropped + heat(used_LG, routing.layer_axis, routing.group_axis, scale=scale, title="Capacity used.")


def nulls(subject: Subject) -> str:
    """Shows the fraction of null choices, as curves and as a heat map."""
    routing = subject.routing
    if not any(group.num_null for group in routing.groups):
        absent = _absent_share(routing)
        found = f" {absent:.1%} of the choices in {routing.window.words} are absent: no expert takes them."
        return f"<p>The model has no null experts.{found if absent else ''}</p>"
    by_frame = [group_metrics(f.choices_LC, f.tokens_LG, routing.groups)["null_fraction"] for f in routing.frames]
    lines = {group.name: [_percentile(null_LG[:, g], 50) for null_LG in by_frame] for g, group in enumerate(routing.groups)}
    over_steps = curves(
        lines, _at(routing), title="Null choices.", x="step", y="Share of the choices, median layer.", top=1
    )
    window = routing.window
    null_LG = group_metrics(window.choices_LC, window.tokens_LG, routing.groups)["null_fraction"]
    scale = linear_scale("share of the choices that are null", 1.0)
    return over_steps + heat(null_LG, routing.layer_axis, routing.group_axis, scale=scale, title="Null choices.")


def _absent_share(routing: Routing) -> float:
    """Returns the share of the tokens' choices that are in no column; 0 where experts choose tokens."""
    if any(group.token_share is not None for group in routing.groups):
        return 0.0
    choices_G = [min(group.top_k, group.num_columns) for group in routing.groups]
    return 1 - routing.window.choices_LC.sum() / max(1, (routing.window.tokens_LG * choices_G).sum())


def drift(subject: Subject) -> str:
    """Shows the total variation distance from the choices of the last steps to those of earlier steps, and to those of
    another run."""
    routing, against = subject.routing, subject.against
    frames = routing.frames
    parts = []
    if len(frames) > 1:
        lines = {
            group.name: [
                _percentile(numbers.distance(_columns(a, routing, g), _columns(routing.window, routing, g)), 50)
                for a in frames
            ]
            for g, group in enumerate(routing.groups)
        }
        words = "Total variation distance from the choices of the last steps, median layer: 0 is equal, 1 is disjoint."
        parts.append(curves(lines, _at(routing), title="Over the steps.", x="step", y=words, top=0.5))
    if against is None:
        return (
            "".join(parts)
            + "<p>Compare with another run, trace or checkpoint's trace: moe-dist report ... --against PATH.</p>"
        )
    one, other, which = _compared(routing, against)
    apart_LG = np.stack(
        [numbers.distance(_columns(other, routing, g), _columns(one, routing, g)) for g in range(len(routing.groups))],
        axis=1,
    )
    scale = linear_scale(f"total variation distance of the choices from those of {against.name}; {which}", 1.0)
    parts.append(heat(apart_LG, routing.layer_axis, routing.group_axis, scale=scale, title="Against another run."))
    return "".join([*parts, _same_tokens(routing, against)])


def sent(subject: Subject) -> str:
    """Shows a table of the rows and bytes that a step sent, above those that its traced choices would send elsewhere."""
    window, elsewhere = subject.routing.window, ledger(subject)
    if not window.ledger:
        return elsewhere
    names = ("rows_remote", "rows_per_pair", "payload_bytes", "metadata_bytes")
    cells = [f"{window.ledger.get(name, 0) / subject.routing.window_steps:,.0f}" for name in names]
    head = ("rows sent", "rows if one for each (token, expert)", "bytes of rows", "bytes of counts, indices and weights")
    caption = f"Sum of a step over ranks and layers, mean of {window.words}. Bytes include backward and recomputation."
    return table(head, [cells], caption=caption) + elsewhere


def _compared(routing: Routing, against: Routing) -> tuple[Frame, Frame, str]:
    """Returns two frames to compare, of held-out tokens if both traces have some, and a text that names the tokens."""
    one, two = routing.tokens, against.tokens
    if one is not None and two is not None and one.split == two.split == "held-out":
        columns = routing.window.choices_LC.shape[1]
        mine, other = (
            each.window._replace(choices_LC=count_choices(tokens.ids_TLK, columns))
            for each, tokens in ((routing, one), (against, two))
        )
        return mine, other, "held-out tokens of both"
    same = routing.split == against.split
    which = f"{routing.split} tokens of both" if same else f"other tokens: {routing.split} against {against.split}"
    return routing.window, against.window, which


def _same_tokens(routing: Routing, against: Routing) -> str:
    """Compares the experts of single tokens. Uses only sequences whose tokens are equal in both traces."""
    one, two = routing.tokens, against.tokens
    if one is None or two is None or not (one.named and two.named):
        return "<p>Single tokens are compared if both have a trace of the same tokens with their ids.</p>"
    first, second = (tokens.sequence_T * 2**31 + tokens.position_T for tokens in (one, two))
    _, mine, other = np.intersect1d(first, second, return_indices=True)
    differ = one.token_T[mine] != two.token_T[other]
    same = ~np.isin(one.sequence_T[mine], one.sequence_T[mine[differ]])  # leaves out each sequence in which a token differs
    mine, other = mine[same], other[same]
    if not len(mine):
        return "<p>The two traces have no sequence in common.</p>"
    share_L = numbers.same_experts(one.ids_TLK[mine], two.ids_TLK[other], routing.placement.num_experts)
    values = {f"layer {layer}": (float(v), "") for layer, v in zip(routing.layers, np.nan_to_num(share_L), strict=True)}
    words = f"Share of the true experts that both choose for the same {len(mine):,} tokens, of those that either chooses."
    return bars(values, title="The same tokens.", caption=words)


def _columns(frame: Frame, routing: Routing, g: int) -> np.ndarray:
    return np.concatenate(group_choices(frame.choices_LC, routing.groups)[g], axis=1)


def _at(routing: Routing) -> list[float]:
    return [float(frame.last) for frame in routing.frames]


def _percentile(values: np.ndarray, percent: float) -> float:
    known = values[~np.isnan(values)]
    return float(np.percentile(known, percent)) if known.size else float("nan")


# Each entry has the panel's title, the question that it answers, and its function.
PANELS: tuple[tuple[str, str, Callable[[Subject], str]], ...] = (
    ("Load by layer and expert", "Which experts are busy, which idle, and on which rank?", load),
    ("Work of the ranks", "Which rank do the others wait for?", ranks),
    ("Load over the steps", "Does the load get more even?", percentiles),
    ("Lorenz curve and Gini", "How concentrated is the load?", concentration),
    ("Dead experts", "Which experts learn nothing?", dead),
    ("Capacity", "What does a capacity drop, and how full is the busiest expert?", capacity),
    ("Null choices", "How much do null experts save?", nulls),
    ("Experts a token", "Which tokens get many experts?", experts_a_token),
    ("Compute maps", "Which cells of a picture and words of a text get many experts?", compute_maps),
    ("Co-activation", "Which experts work together?", coactivation),
    ("Specialisation", "Which tokens does an expert take?", specialisation),
    ("Byte ledger", "What do these choices send, and what on other ranks, placements and nodes?", sent),
    ("Drift", "How much did the routing change?", drift),
)
