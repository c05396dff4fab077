"""The panels of a report. Each is a function of `Subject` that returns HTML, and one line in PANELS. A panel without its
data returns a sentence that says so.

Shape letters: L MoE layers, G groups, T tokens, n true experts of a group, E true experts, C columns, R ranks, F frames.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from moe_dist.monitor.heatmaps import Axis, linear_scale, ratio_scale
from moe_dist.monitor.metrics import divide, group_choices, group_metrics
from moe_dist.monitor.report import numbers
from moe_dist.monitor.report.drawing import MOST_FRAMES, bars, curves, details, heat, png, short, slider, table
from moe_dist.monitor.report.findings import dead_experts, work_of_ranks
from moe_dist.monitor.report.routing import Frame, Routing, Tokens, merged
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

SHOWN_CELLS = 256  # (layer, expert) pairs whose tokens are listed
SHOWN_MATRICES = 48  # co-activation matrices that are drawn
AROUND = 5  # tokens of an example's text on each side
NO_TOKENS = "This panel needs a trace: set monitor.trace in the run, or write one of a trained run with moe-dist trace."

# The first pattern that matches a token's whole text names its class.
CLASSES = (
    ("special", r"<\w+>"),
    ("whitespace", r"\s+"),
    ("number", r"\s*[\d.]*\d[\d.]*"),
    ("word", r"\s*[^\W\d_]+"),
    ("name with _ or digits", r"\s*\w+"),
    ("punctuation", r"[^\w]+"),
)
COUNTS = (1, 10, 100, 1000)  # classes of frequency begin at these numbers of occurrences


@dataclass(frozen=True)
class Layout:
    """A placement of the experts on the ranks of an EP group for the byte ledger."""

    policy: str
    placement: ExpertPlacement


@dataclass(frozen=True)
class Subject:
    """What a report is about: a routing, another one to compare with, and the layouts and node sizes of the ledger."""

    routing: Routing
    against: Routing | None
    layouts: Sequence[Layout]
    node_sizes: tuple[int, ...]


def load(subject: Subject) -> str:
    """Heat maps of load / mean load over layers and experts, for each group, with a slider over the steps."""
    routing = subject.routing
    scale = ratio_scale("load of an expert / mean load of its group in the layer: 1 is even")

    def frame(frame: Frame) -> str:
        maps = []
        for group, part in zip(routing.groups, group_choices(frame.choices_LC, routing.groups), strict=True):
            values_Ln = divide(part.true_Ln, part.true_Ln.mean(1, keepdims=True))
            ranks = tuple(f"r{routing.placement.rank_of_expert[e]}" for e in group.experts)
            columns = Axis("expert, and the rank that holds it", [str(i) for i in range(group.num_experts)], ranks)
            maps.append(heat(values_Ln, _layers(routing), columns, scale=scale, title=f"Group {group.name}."))
        return "".join(maps)

    return slider([(each.label, frame(each)) for each in merged(routing.frames, MOST_FRAMES)], legend="Steps")


def ranks(subject: Subject) -> str:
    """Heat map of the work of each rank in each layer."""
    work_LR = work_of_ranks(subject.routing)
    columns = Axis("rank of the EP group", [str(rank) for rank in range(work_LR.shape[1])])
    scale = ratio_scale("pairs x FFN width of a rank / mean of the ranks: the others wait for the busiest rank")
    values_LR = divide(work_LR, work_LR.mean(1, keepdims=True))
    return heat(values_LR, _layers(subject.routing), columns, scale=scale, title="Work of the ranks.")


def percentiles(subject: Subject) -> str:
    """Curves of percentiles of load / mean load over all layers and experts."""
    routing, pictures = subject.routing, []
    for g, group in enumerate(routing.groups):
        loads = [group_choices(frame.choices_LC, routing.groups)[g].true_Ln for frame in routing.frames]
        over = [divide(load_Ln, load_Ln.mean(1, keepdims=True)).ravel() for load_Ln in loads]
        lines = {f"p{p}": [_percentile(values, p) for values in over] for p in (50, 75, 90, 99)}
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
    """Lorenz curves and Gini coefficients."""
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
    """Table of the experts that no token took, with the last frame in which a token took each."""
    routing, rows = subject.routing, []
    for layer, expert in dead_experts(routing):
        alive = [frame.label for frame in routing.frames if frame.choices_LC[layer, expert]]
        rows.append((str(routing.layers[layer]), routing.placement.name_of(expert), alive[-1] if alive else "never"))
    if not rows:
        return f"<p>Every expert was taken in every layer in steps {routing.window.label}.</p>"
    more = f"<p>The first 200 of {len(rows)}.</p>" if len(rows) > 200 else ""
    return more + table(("layer", "expert", "last steps with a token"), rows[:200], caption="Experts that no token took.")


def capacity(subject: Subject) -> str:
    """Curves of the dropped share, and a heat map of the capacity factor that drops nothing."""
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
        "capacity factor that drops nothing: busiest expert / even share", max(2.0, float(np.nanmax(used_LG)))
    )
    return dropped + heat(used_LG, _layers(routing), _groups(routing), scale=scale, title="Capacity used.")


def nulls(subject: Subject) -> str:
    """Curves and a heat map of the share of null choices."""
    routing = subject.routing
    if not any(group.num_null for group in routing.groups):
        return "<p>The model has no null experts.</p>"
    by_frame = [group_metrics(f.choices_LC, f.tokens_LG, routing.groups)["null_fraction"] for f in routing.frames]
    lines = {group.name: [_percentile(null_LG[:, g], 50) for null_LG in by_frame] for g, group in enumerate(routing.groups)}
    over_steps = curves(
        lines, _at(routing), title="Null choices.", x="step", y="Share of the choices, median layer.", top=1
    )
    window = routing.window
    null_LG = group_metrics(window.choices_LC, window.tokens_LG, routing.groups)["null_fraction"]
    scale = linear_scale("share of the choices that are null", 1.0)
    return over_steps + heat(null_LG, _layers(routing), _groups(routing), scale=scale, title="Null choices.")


def experts_a_token(subject: Subject, tokens: Tokens) -> str:
    """Bars and a heat map of true experts per token: by modality, class of token and frequency."""
    routing = subject.routing
    count_TL = ((tokens.ids_TLK >= 0) & (tokens.ids_TLK < routing.placement.num_experts)).sum(2)
    by_modality = {name: tokens.modality_T == m for m, name in enumerate(routing.modalities)}
    means_LM = np.stack([_mean(count_TL[rows]) for rows in by_modality.values()], axis=1)
    columns = Axis("modality", list(by_modality))
    scale = linear_scale("true experts a token", max(1.0, float(np.nanmax(np.nan_to_num(means_LM)))))
    parts = [
        _bars(
            count_TL, by_modality, title="By modality.", caption="True experts a token and layer; number of tokens in grey."
        ),
        heat(means_LM, _layers(routing), columns, scale=scale, title="By modality and layer."),
        _bars(count_TL, _classes(tokens, routing.modalities), title="By class of token.", caption="Mean over the layers."),
    ]
    _, at, counts = np.unique(tokens.token_T, return_inverse=True, return_counts=True)
    bin_T = np.searchsorted(COUNTS, counts[at], side="right") - 1
    names = [f"{low} to {high - 1} times" for low, high in zip(COUNTS, (*COUNTS[1:], 0), strict=True)]
    names[0], names[-1] = f"fewer than {COUNTS[1]} times", f"{COUNTS[-1]} times or more"
    by_count = {
        f"{modality}, {name}": rows & (bin_T == i) for modality, rows in by_modality.items() for i, name in enumerate(names)
    }
    return "".join(
        [*parts, _bars(count_TL, by_count, title="By frequency.", caption="How often the trace has the token id.")]
    )


def coactivation(subject: Subject, tokens: Tokens) -> str:
    """Heat maps of how often a token takes two experts together."""
    routing, found = subject.routing, []
    scale = ratio_scale("how often a token takes both experts / how often it would if they were independent")
    for group in routing.groups:
        rows = _rows_of(tokens, routing, group)
        if group.top_k < 2 or not rows.any() or group.num_experts < 2:
            continue
        names = [str(i) for i in range(group.num_experts)]
        for layer, ids_TK in enumerate(tokens.ids_TLK[rows].transpose(1, 0, 2)):
            lift_nn = numbers.together(numbers.taken(ids_TK, group))
            strongest = 0.0 if np.isnan(lift_nn).all() else float(np.nanmax(lift_nn))
            title = f"Group {group.name}, layer {routing.layers[layer]}."
            found.append(
                (strongest, title, heat(lift_nn, Axis("expert", names), Axis("expert", names), scale=scale, title=title))
            )
    if not found:
        return "<p>No token takes two experts.</p>"
    found.sort(key=lambda each: -each[0])
    first, *others = found[:SHOWN_MATRICES]
    cut = f"<p>The {SHOWN_MATRICES} strongest of {len(found)} layers and groups.</p>" if len(found) > SHOWN_MATRICES else ""
    return (
        cut + first[2] + "".join(details(f"{title} Largest lift {short(lift)}", picture) for lift, title, picture in others)
    )


def specialisation(subject: Subject, tokens: Tokens) -> str:
    """Tables of the tokens that tell most of an expert, with an example of each expert."""
    routing = subject.routing
    layers = len(routing.layers)
    shown = np.unique(
        np.linspace(0, layers - 1, max(1, min(layers, SHOWN_CELLS // routing.placement.num_experts))).astype(int)
    )
    room = SHOWN_CELLS // len(shown)  # experts of a layer
    parts = []
    for layer in shown.tolist():
        rows = [row for group in routing.groups for row in _special_rows(tokens, routing, group, layer)]
        title = f"Layer {routing.layers[layer]}" + (f", {room} of {len(rows)} experts" if len(rows) > room else "")
        head = ("expert", "tokens it takes", "takes most of (share of that token)", "example")
        content = table(head, rows[:room], caption="Tokens that an expert takes more than other experts do.", raw=True)
        parts.append(details(title, content, open_=layer == shown[-1]))
    left = f"<p>{len(shown)} of {layers} layers.</p>" if len(shown) < layers else ""
    return left + "".join(parts)


def ledger(subject: Subject, tokens: Tokens) -> str:
    """Table of the bytes that the traced choices send at several EP sizes, placements and node sizes."""
    routing, configuration = subject.routing, subject.routing.configuration
    try:
        hidden, precision = configuration["model"]["hidden_dim"], configuration["parallel"]["precision"]
        micro_batch = configuration["train"]["micro_batch"]
    except (KeyError, TypeError):
        return "<p>The configuration of this trace does not tell the hidden size, so that bytes are unknown.</p>"
    row_bytes = 4 * hidden * {"bf16": 2, "fp32": 4}[precision]  # dispatch and combine, and the gradient of each
    rows, total = [], max(1, len(tokens.token_T))
    for layout in subject.layouts:
        size = layout.placement.num_ranks
        found = numbers.traffic(
            tokens.ids_TLK, tokens.sequence_T // micro_batch % size, layout.placement, subject.node_sizes
        )
        flat = (f"{found.between[node] * row_bytes / total:,.0f}" if node < size else "0" for node in subject.node_sizes)
        once = (
            f"{found.between_hierarchical[node] * row_bytes / total:,.0f}" if node < size else "0"
            for node in subject.node_sizes
        )
        saved = f"{1 - found.rows / found.pairs_remote:.0%}" if found.pairs_remote else "-"
        work = f"{found.imbalance:.2f}"
        cells = (f"{found.rows / total / len(routing.layers):.3f}", f"{found.rows * row_bytes / total:,.0f}", saved, work)
        rows.append((str(size), layout.policy, *cells, *(f"{a} / {b}" for a, b in zip(flat, once, strict=True))))
    head = ("EP", "placement", "rows a token and layer", "bytes a token", "saved by one row a rank", "busiest rank / mean")
    nodes = tuple(f"bytes between nodes of {size}" for size in subject.node_sizes)
    caption = (
        "Payload of forward and backward over all layers, without recomputation. Between nodes: one row for each (token, "
        "rank) / one row for each (token, node), as the dispatch hierarchical sends."
    )
    return table((*head, *nodes), rows, caption=caption)


def drift(subject: Subject) -> str:
    """How far the choices of earlier steps, and of another run, are from the last ones."""
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
    apart_LG = np.stack(
        [
            numbers.distance(_columns(against.window, routing, g), _columns(routing.window, routing, g))
            for g in range(len(routing.groups))
        ],
        axis=1,
    )
    scale = linear_scale(f"total variation distance of the choices from those of {against.name}", 1.0)
    parts.append(heat(apart_LG, _layers(routing), _groups(routing), scale=scale, title="Against another run."))
    return "".join([*parts, _same_tokens(routing, against)])


def _same_tokens(routing: Routing, against: Routing) -> str:
    """Compares the experts of single tokens, if both traces have the same tokens."""
    one, two = routing.tokens, against.tokens
    if one is None or two is None:
        return "<p>Single tokens are compared if both have a trace of the same tokens.</p>"
    first, second = (tokens.sequence_T * 2**31 + tokens.position_T for tokens in (one, two))
    _, mine, other = np.intersect1d(first, second, return_indices=True)
    equal = one.token_T[mine] == two.token_T[other]
    mine, other = mine[equal], other[equal]
    if not len(mine):
        return "<p>The two traces have no token in common.</p>"
    share_L = numbers.same_experts(one.ids_TLK[mine], two.ids_TLK[other], routing.placement.num_experts)
    values = {f"layer {layer}": (float(v), "") for layer, v in zip(routing.layers, np.nan_to_num(share_L), strict=True)}
    words = f"Share of the true experts that both choose for the same {len(mine):,} tokens, of those that either chooses."
    return bars(values, title="The same tokens.", caption=words)


def _special_rows(tokens: Tokens, routing: Routing, group: ExpertGroup, layer: int) -> Iterator[tuple[str, ...]]:
    rows = np.flatnonzero(_rows_of(tokens, routing, group))
    if not len(rows):
        return
    taken_Tn = numbers.taken(tokens.ids_TLK[rows, layer], group)
    for expert, found in enumerate(numbers.special_tokens(tokens.token_T[rows], taken_Tn, most=6)):
        words = " ".join(f"<span>{_token(tokens, s.token)}&nbsp;{s.share:.0%}</span>" for s in found)
        example = _example(tokens, int(rows[found[0].row])) if found else ""
        yield (
            f"{escape(group.name)}/{expert}",
            f"{taken_Tn[:, expert].mean():.0%}",
            f'<span class="k">{words or "no token in particular"}</span>',
            f'<span class="k">{example}</span>',
        )


def _example(tokens: Tokens, row: int) -> str:
    """The token in its text: `AROUND` tokens of the same sequence on each side."""
    near = range(max(0, row - AROUND), min(len(tokens.token_T), row + AROUND + 1))
    same = [i for i in near if tokens.sequence_T[i] == tokens.sequence_T[row]]
    parts = [_token(tokens, int(tokens.token_T[i]), plain=True) for i in same]
    return "".join(f"<mark>{part}</mark>" if i == row else part for i, part in zip(same, parts, strict=True))


def _token(tokens: Tokens, token: int, *, plain: bool = False) -> str:
    """A token as HTML: its pixels, its text, or its number."""
    pixels = tokens.picture_of(token)
    if pixels is not None:
        return f'<img class="p" src="{png(pixels)}" alt="code {token}" title="{token}">'
    name = tokens.name_of(token)
    if name is None:
        return f"<code>{token}</code>" + (" " if plain else "")
    visible = "".join("⏎" if c == "\n" else "⇥" if c == "\t" else c if c.isprintable() else "�" for c in name)
    return escape(visible) if plain else f'<code title="{token}">{escape(visible).replace(" ", "␣")}</code>'


def _classes(tokens: Tokens, modalities: Sequence[str]) -> dict[str, np.ndarray]:
    """The rows of each class of tokens, in the order of CLASSES. Picture tokens are of one colour, or drawn."""
    ids, at = np.unique(tokens.token_T, return_inverse=True)
    _, first = np.unique(tokens.token_T, return_index=True)
    names = []
    for token, row in zip(ids.tolist(), first.tolist(), strict=True):
        pixels, text = tokens.picture_of(token), tokens.name_of(token)
        modality = modalities[tokens.modality_T[row]]
        if pixels is not None:
            plain = (np.ptp(pixels.reshape(-1, 3).astype(int), axis=0) < 24).all()
            names.append(f"{modality}, {'one colour' if plain else 'drawn'}")
        elif text is not None:
            names.append(f"{modality}, {next((name for name, p in CLASSES if re.fullmatch(p, text)), 'other')}")
        else:
            names.append(f"{modality}, without a name")
    return {name: np.array([each == name for each in names])[at] for name in sorted(set(names))}


def _bars(count_TL: np.ndarray, rows: dict[str, np.ndarray], *, title: str, caption: str) -> str:
    found = {name: count_TL[of] for name, of in rows.items() if of.any()}
    return bars({name: (float(c.mean()), f"{len(c):,}") for name, c in found.items()}, title=title, caption=caption)


def _rows_of(tokens: Tokens, routing: Routing, group: ExpertGroup) -> np.ndarray:
    members = [m for m, name in enumerate(routing.modalities) if name in group.modalities]
    return np.isin(tokens.modality_T, members)


def _columns(frame: Frame, routing: Routing, g: int) -> np.ndarray:
    return np.concatenate(group_choices(frame.choices_LC, routing.groups)[g], axis=1)


def _layers(routing: Routing) -> Axis:
    return Axis("layer", [str(layer) for layer in routing.layers])


def _groups(routing: Routing) -> Axis:
    return Axis("group", [group.name for group in routing.groups])


def _at(routing: Routing) -> list[float]:
    return [float(frame.last) for frame in routing.frames]


def _mean(counts_TL: np.ndarray) -> np.ndarray:
    return counts_TL.mean(0) if len(counts_TL) else np.full(counts_TL.shape[1], np.nan)


def _percentile(values: np.ndarray, percent: float) -> float:
    known = values[~np.isnan(values)]
    return float(np.percentile(known, percent)) if known.size else float("nan")


def of_tokens(panel: Callable[[Subject, Tokens], str]) -> Callable[[Subject], str]:
    """A panel that needs single tokens."""

    def draw(subject: Subject) -> str:
        tokens = subject.routing.tokens
        return f"<p>{NO_TOKENS}</p>" if tokens is None or not len(tokens.token_T) else panel(subject, tokens)

    return draw


# Title, the question that the panel answers, and its function.
PANELS: tuple[tuple[str, str, Callable[[Subject], str]], ...] = (
    ("Load by layer and expert", "Which experts are busy, which idle, and on which rank?", load),
    ("Work of the ranks", "Which rank do the others wait for?", ranks),
    ("Load over the steps", "Does the load get more even?", percentiles),
    ("Lorenz curve and Gini", "How concentrated is the load?", concentration),
    ("Dead experts", "Which experts learn nothing?", dead),
    ("Capacity", "What does a capacity drop, and which factor would drop nothing?", capacity),
    ("Null choices", "How much do null experts save?", nulls),
    ("Experts a token", "Which tokens get many experts?", of_tokens(experts_a_token)),
    ("Co-activation", "Which experts work together?", of_tokens(coactivation)),
    ("Specialisation", "Which tokens does an expert take?", of_tokens(specialisation)),
    ("Byte ledger", "What would these choices send on other ranks, placements and nodes?", of_tokens(ledger)),
    ("Drift", "How much did the routing change?", drift),
)
