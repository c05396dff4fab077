"""Defines those panels of a report that need single tokens (see `panels.py`).

Shape letters: L MoE layers, T tokens, n true experts of a group, V token ids.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import pairwise

import numpy as np

from moe_dist.monitor.heatmaps import INK, Axis, Scale, colour, ink_on, linear_scale, ratio_scale
from moe_dist.monitor.report import numbers
from moe_dist.monitor.report.drawing import bars, details, heat, png, short, table
from moe_dist.monitor.report.routing import Routing, Subject, Tokens
from moe_dist.placement.placement import ExpertGroup

SHOWN_CELLS = 256  # largest number of (layer, expert) pairs whose tokens are listed
SHOWN_MATRICES, SHOWN_PAIRS = 24, 200  # largest numbers of drawn co-activation matrices and of listed pairs of experts
MAPS, MAPPED_TEXTS, LONGEST_TEXT = 12, 4, 160  # largest numbers in the compute map: pictures, texts, tokens of a text
AROUND = 5  # number of tokens shown before and after an example
NO_TOKENS = "This panel needs a trace: set monitor.trace in the run, or write one of a trained run with moe-dist trace."

# The class of a token is that of the first pattern that matches the token's whole text.
CLASSES = (
    ("special", r"<\w+>"),
    ("whitespace", r"\s+"),
    ("number", r"\s*[\d.]*\d[\d.]*"),
    ("word", r"\s*[^\W\d_]+"),
    ("name with _ or digits", r"\s*\w+"),
    ("punctuation", r"[^\w]+"),
)
LOSSES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # in nats; each class of loss begins at one of these
COUNTS = (1, 10, 100, 1000)  # each class of frequency begins at one of these numbers of occurrences


def of_tokens(panel: Callable[[Subject, Tokens], str]) -> Callable[[Subject], str]:
    """Wraps a panel. The wrapped panel returns NO_TOKENS if the subject has no trace of single tokens."""

    def draw(subject: Subject) -> str:
        tokens = subject.routing.tokens
        return f"<p>{NO_TOKENS}</p>" if tokens is None or not len(tokens.token_T) else panel(subject, tokens)

    return draw


@of_tokens
def experts_a_token(subject: Subject, tokens: Tokens) -> str:
    """Shows true experts per token by modality, loss, class of token and frequency, as bars and as a heat map."""
    routing, count_TL = subject.routing, _true_experts(subject.routing, tokens)
    by_modality = {name: tokens.modality_T == m for m, name in enumerate(routing.modalities)}
    means_LM = np.stack([_mean(count_TL[rows]) for rows in by_modality.values()], axis=1)
    columns = Axis("modality", list(by_modality))
    scale = linear_scale("true experts a token", max(1.0, float(np.nanmax(np.nan_to_num(means_LM)))))
    parts = [
        _bars(
            count_TL, by_modality, title="By modality.", caption="True experts a token and layer; number of tokens in grey."
        ),
        heat(means_LM, routing.layer_axis, columns, scale=scale, title="By modality and layer."),
    ]
    if tokens.loss_T is not None:
        names = [f"{low:g} to {high:g} nats" for low, high in pairwise(LOSSES)] + [f"{LOSSES[-1]:g} nats or more"]
        bin_T = np.where(np.isnan(tokens.loss_T), -1, np.searchsorted(LOSSES, tokens.loss_T, side="right") - 1)
        by_loss = {
            f"{modality}, {name}": rows & (bin_T == i)
            for modality, rows in by_modality.items()
            for i, name in enumerate(names)
        }
        parts.append(_bars(count_TL, by_loss, title="By loss.", caption="Loss of the prediction made at the token."))
    if not tokens.named:
        return "".join(parts)
    classes = _classes(tokens, routing.modalities)
    parts.append(_bars(count_TL, classes, title="By class of token.", caption="Mean over the layers."))
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


@of_tokens
def compute_maps(subject: Subject, tokens: Tokens) -> str:
    """Draws pictures, each above a map of its cells, and coloured texts. The colour of a map's cell, and the background
    colour of a text's token, show the number of true experts."""
    if not tokens.named:
        return "<p>The trace has no token ids.</p>"
    experts_T = _true_experts(subject.routing, tokens).mean(1)
    most = max(min(group.top_k, group.num_experts) for group in subject.routing.groups)
    most = max(most, experts_T.max())  # if experts choose, a token may take more than top_k
    scale = linear_scale("true experts a token, mean over the layers", float(most))
    legend = " ".join(_coloured(tick, scale.write(tick), scale) for tick in scale.ticks)
    pictures, texts = _runs(tokens)
    drawn = [pictures[i] for i in np.random.default_rng(0).permutation(len(pictures))[:MAPS]]
    texts = [rows[:LONGEST_TEXT] for rows in sorted(texts, key=len, reverse=True)[:MAPPED_TEXTS]]
    parts = [_picture_map(tokens, rows, experts_T[rows], scale) for rows in drawn]
    parts += [f'<p class="k">{"".join(_text_map(tokens, rows, experts_T, scale))}</p>' for rows in texts]
    return f"<p>{scale.caption}: {legend}</p>{''.join(parts)}"


@of_tokens
def coactivation(subject: Subject, tokens: Tokens) -> str:
    """Shows how often a token is routed to both experts of a pair, as heat maps."""
    routing, found = subject.routing, []
    scale = ratio_scale("how often a token takes both experts / how often it would if they were independent")
    for group in routing.groups:
        rows = _rows_of(tokens, routing, group)
        if not rows.any() or group.num_experts < 2:
            continue
        for layer, ids_TK in enumerate(tokens.ids_TLK[rows].transpose(1, 0, 2)):
            taken_Tn = numbers.taken(ids_TK, group)
            if (taken_Tn.sum(1) > 1).any():
                lift_nn = numbers.together(taken_Tn)
                found.append((float(np.nanmax(lift_nn)), layer, group, int(np.nanargmax(lift_nn))))
    if not found:
        return "<p>No token takes two experts.</p>"
    found.sort(key=lambda each: -each[0])
    room = np.cumsum([group.num_experts**2 for _, _, group, _ in found]) <= subject.matrix_cells
    parts = []
    # The loop computes the shown matrices again. Keeping the matrices of all layers might need too much memory.
    for lift, layer, group, _ in found[: min(SHOWN_MATRICES, int(room.sum()))]:
        names = Axis("expert", [str(i) for i in range(group.num_experts)])
        title = f"Group {group.name}, layer {routing.layers[layer]}."
        lift_nn = numbers.together(numbers.taken(tokens.ids_TLK[_rows_of(tokens, routing, group), layer], group))
        picture = heat(lift_nn, names, names, scale=scale, title=title)
        parts.append(details(f"{title} Largest lift {short(lift)}", picture) if parts else picture)
    if len(parts) == len(found):
        return "".join(parts)
    largest = [
        (group.name, str(routing.layers[layer]), short(lift), "{} and {}".format(*divmod(pair, group.num_experts)))
        for lift, layer, group, pair in found[:SHOWN_PAIRS]
    ]
    pairs = table(("group", "layer", "largest lift", "experts"), largest, caption="Strongest pair of each layer and group.")
    return f"<p>Matrices of the {len(parts)} strongest of {len(found)} layers and groups.</p>{''.join(parts)}{pairs}"


@of_tokens
def specialisation(subject: Subject, tokens: Tokens) -> str:
    """Shows tables of the tokens that characterise each expert most, with one example for each expert."""
    routing = subject.routing
    if not tokens.named:
        return "<p>The trace has no token ids.</p>"
    layers = len(routing.layers)
    shown = np.unique(
        np.linspace(0, layers - 1, max(1, min(layers, SHOWN_CELLS // routing.placement.num_experts))).astype(int)
    )
    room = SHOWN_CELLS // len(shown)  # number of experts shown for a layer
    parts = []
    for layer in shown.tolist():
        rows = [row for group in routing.groups for row in _special_rows(tokens, routing, group, layer)]
        title = f"Layer {routing.layers[layer]}" + (f", {room} of {len(rows)} experts" if len(rows) > room else "")
        head = ("expert", "tokens it takes", "takes most of (share of that token)", "example")
        content = table(head, rows[:room], caption="Tokens that an expert takes more than other experts do.", raw=True)
        parts.append(details(title, content, open_=layer == shown[-1]))
    left = f"<p>{len(shown)} of {layers} layers.</p>" if len(shown) < layers else ""
    return left + "".join(parts)


@of_tokens
def ledger(subject: Subject, tokens: Tokens) -> str:
    """Shows a table of the bytes that the traced choices send with several EP sizes, placements and node sizes."""
    routing, configuration = subject.routing, subject.routing.configuration
    try:
        hidden, micro_batch = int(configuration["model"]["hidden_dim"]), int(configuration["train"]["micro_batch"])
        itemsize = {"bf16": 2, "fp32": 4}[configuration["parallel"]["precision"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        hidden = micro_batch = itemsize = 0
    if not (0 < hidden < 1 << 31 and 0 < micro_batch < 1 << 31):
        return "<p>The configuration of this trace does not tell the hidden size, so that bytes are unknown.</p>"
    row_bytes = 4 * hidden * itemsize  # each row is sent 4 times: dispatch, combine, and the gradient of each
    rows, total = [], max(1, len(tokens.token_T))
    for layout in subject.layouts:
        size = layout.placement.num_ranks
        choices = (tokens.ids_TLK, tokens.sequence_T, layout.placement, subject.node_sizes)
        found = numbers.traffic(*choices, micro_batch=micro_batch)
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
    """Returns a token as HTML, between up to `AROUND` tokens before it and up to `AROUND` after it in its sequence."""
    near = range(max(0, row - AROUND), min(len(tokens.token_T), row + AROUND + 1))
    same = [i for i in near if tokens.sequence_T[i] == tokens.sequence_T[row]]
    parts = [_token(tokens, int(tokens.token_T[i]), plain=True) for i in same]
    return "".join(f"<mark>{part}</mark>" if i == row else part for i, part in zip(same, parts, strict=True))


def _token(tokens: Tokens, token: int, *, plain: bool = False) -> str:
    """Returns a token as HTML: its pixels, its text, or its number."""
    pixels = tokens.picture_of(token)
    if pixels is not None:
        return f'<img class="p" src="{png(pixels)}" alt="code {token}" title="{token}">'
    name = tokens.name_of(token)
    if name is None:
        return f"{token} " if plain else f"<code>{token}</code>"
    visible = "".join("⏎" if c == "\n" else "⇥" if c == "\t" else c if c.isprintable() else "�" for c in name)
    return escape(visible) if plain else f'<code title="{token}">{escape(visible).replace(" ", "␣")}</code>'


def _true_experts(routing: Routing, tokens: Tokens) -> np.ndarray:
    """Returns the number of true experts that each token has in each layer, [T, L], not counting dropped pairs."""
    return ((tokens.ids_TLK >= 0) & (tokens.ids_TLK < routing.placement.num_experts)).sum(2)


def _runs(tokens: Tokens) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the token indices of each whole picture, and of each text between pictures. Pictures may follow each
    other directly. If the number of consecutive cells is no multiple of a picture's number of cells, one picture was cut
    off. It is then unknown where pictures begin, so all these cells are left out."""
    ids, at = np.unique(tokens.token_T, return_inverse=True)
    cell_T = np.array([tokens.picture_of(token) is not None for token in ids.tolist()])[at]
    follows = (np.diff(tokens.position_T) == 1) & (np.diff(tokens.sequence_T) == 0) & (cell_T[1:] == cell_T[:-1])
    runs = np.split(np.arange(len(cell_T)), np.flatnonzero(~follows) + 1)
    cells = math.prod(tokens.grid)  # 0 without pictures
    whole = [rows for rows in runs if cell_T[rows[0]] and cells and len(rows) % cells == 0]
    return [picture for rows in whole for picture in rows.reshape(-1, cells)], [
        rows for rows in runs if not cell_T[rows[0]]
    ]


def _picture_map(tokens: Tokens, rows: np.ndarray, experts_T: np.ndarray, scale: Scale) -> str:
    found = [tokens.picture_of(token) for token in tokens.token_T[rows].tolist()]
    patches = np.stack([pixels for pixels in found if pixels is not None])  # all tokens of `rows` are picture cells
    high, wide = tokens.grid
    pixels = patches.reshape(high, wide, *patches.shape[1:]).swapaxes(1, 2)
    pixels = pixels.reshape(high * patches.shape[1], wide * patches.shape[2], 3)
    images = ((pixels, "picture"), (colour(experts_T.reshape(high, wide), scale), "true experts of its cells"))
    shown = "".join(f'<img class="p" src="{png(image)}" alt="{words}">' for image, words in images)
    return f'<figure class="map">{shown}<figcaption>{experts_T.mean():.2f} a cell</figcaption></figure>'


def _text_map(tokens: Tokens, rows: np.ndarray, experts_T: np.ndarray, scale: Scale) -> Iterator[str]:
    for row in rows.tolist():
        text = _token(tokens, int(tokens.token_T[row]), plain=True)
        yield _coloured(float(experts_T[row]), text.replace("⏎", "⏎<br>"), scale)  # a new line begins after each ⏎


def _coloured(experts: float, html: str, scale: Scale) -> str:
    fill = colour(np.array(experts), scale).tolist()
    ink = "#202124" if ink_on(fill) == INK else "#fff"
    return f'<mark style="background:rgb({fill[0]},{fill[1]},{fill[2]});color:{ink}" title="{experts:.2f}">{html}</mark>'


def _classes(tokens: Tokens, modalities: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns a mask of tokens, bool [T], for each class of tokens, by name. Picture tokens are `one colour` or `drawn`."""
    ids, first, at = np.unique(tokens.token_T, return_index=True, return_inverse=True)
    names = []
    for token, row in zip(ids.tolist(), first.tolist(), strict=True):
        pixels, text = tokens.picture_of(token), tokens.name_of(token)
        modality = modalities[int(tokens.modality_T[row])]
        if pixels is not None:
            plain = (np.ptp(pixels.reshape(-1, 3).astype(int), axis=0) < 24).all()
            names.append(f"{modality}, {'one colour' if plain else 'drawn'}")
        elif text is not None:
            names.append(f"{modality}, {next((name for name, p in CLASSES if re.fullmatch(p, text)), 'other')}")
        else:
            names.append(f"{modality}, without a name")
    return {name: np.isin(at, [v for v, each in enumerate(names) if each == name]) for name in sorted(set(names))}


def _bars(count_TL: np.ndarray, rows: dict[str, np.ndarray], *, title: str, caption: str) -> str:
    found = {name: count_TL[of] for name, of in rows.items() if of.any()}
    return bars({name: (float(c.mean()), f"{len(c):,}") for name, c in found.items()}, title=title, caption=caption)


def _rows_of(tokens: Tokens, routing: Routing, group: ExpertGroup) -> np.ndarray:
    members = [m for m, name in enumerate(routing.modalities) if name in group.modalities]
    return np.isin(tokens.modality_T, members)


def _mean(counts_TL: np.ndarray) -> np.ndarray:
    return counts_TL.mean(0) if len(counts_TL) else np.full(counts_TL.shape[1], np.nan)
