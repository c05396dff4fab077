"""Judges the rows of the benchmark's table by rules, explains broken rules, and writes text, Markdown and a picture.

A table row is lost if the whole 95 % interval of a ratio (our time / a rival's time) is above 1.05.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Table = list[list[str]]
# The ratios of times in the order of the tables, and the colour of each ratio in the picture. A ratio with None is not
# drawn.
RATIOS: Mapping[str, tuple[int, int, int] | None] = {
    "dispatch, combine / floor": None,
    "dispatch, combine / floor, all": (20, 20, 20),
    "ours at rank / floor": None,
    "ours at rank / floor, all": None,
    "ours / megatron": (31, 119, 180),
    "ours / megatron, capacity": (23, 158, 160),
    "ours / megatron, remapped": (148, 103, 189),
    "ours / naive": (214, 100, 40),
    "ours / per pair": (170, 140, 40),
    "ours / equal active": (150, 150, 150),
}
OTHERS = [name.removeprefix("ours / ") for name in RATIOS if name.startswith("ours / ")]
LOST_ABOVE = 1.05
FLOOR_LIMIT, FLOOR_AIM = 1.25, 1.10
NAIVE_FACTOR = 1.8
MIN_TOKENS, MIN_HIDDEN = 4096, 512
SLOPE = FLATNESS = (0.9, 1.1)
RIVALS = ("ours / megatron", "ours / megatron, capacity")
FLOORS = ("dispatch, combine / floor", "dispatch, combine / floor, all")
# Sweeps that time whole layers and steps. In these sweeps, `megatron, remapped` is also a rival.
WHOLE = ("layer", "step")
NOT_EXPLAINED = "not explained yet"
# Maps comparison and sweep ("" for all sweeps not listed) to the reason why the rule does not hold, and tried remedies.
EXPLANATIONS: Mapping[str, Mapping[str, str]] = {
    "dispatch, combine / floor": {
        "": "this floor leaves out the rows for experts on the own rank, half of all rows at two ranks; 'floor, all' has "
        "them. Tried: copying these rows during the exchange (no gain where the exchange runs on the same cores), "
        "embedding_bag for the sums (saves 0.3 ms of 11), index_copy_ for first terms (slower)",
    },
    "dispatch, combine / floor, all": {
        "": "the floor has no exchange of weights, and no sums over a token's rows. They cost 0.7 ms at 256 tokens and "
        "3.3 ms at 16,384. The ratio falls from 1.87 to 1.15. Tried: the exchange of weights already overlaps the exchange "
        "of rows",
        "null fraction": "few rows leave the fixed costs visible: the exchange of weights, and writing all of y. Tried: "
        "the exchange of weights already overlaps the exchange of rows. Without it the rows would have to carry the "
        "weights",
    },
    "ours / naive": {
        "": "the median meets the rule, but the interval is wide. Tried: nothing, because the neighbours of the row meet it"
    },
    "time over tokens": {
        "": "fixed costs of 1 to 4 ms make time grow more slowly than the tokens. They are the exchange of weights and, "
        "with the plan, the exchanges of counts and indices and a host sync. Tried: indices of pairs are exchanged while "
        "tokens are looked up",
    },
    "cost a row / the first's": {
        "": "the interval of the ratio includes 1. Tried: nothing, because the rows of 16 to 64 experts meet the rule"
    },
}


@dataclass(frozen=True)
class BenchResult:
    """The result of judging one comparison by its rule."""

    row: str  # key of the row, '<sweep>/<label>'
    comparison: str  # for example 'ours / megatron'
    rule: str
    ratio: float  # median of our time / the rival's time
    low: float  # lower end of the ratio's 95 % interval
    high: float
    met: bool  # true if the rule holds
    reason: str = ""  # why the rule does not hold, if known


def judge(rows: Mapping[str, Any]) -> list[BenchResult]:
    """Judges the comparisons in all rows of a file. Comparisons whose rule does not hold come first."""
    return sorted((each for key, row in rows.items() for each in _judge_row(key, row)), key=lambda each: each.met)


def _judge_row(key: str, row: Mapping[str, Any]) -> Iterator[BenchResult]:
    if key.startswith("scaling/"):
        yield from _judge_scaling(key, row)
        return
    point = row["point"]
    whole = key.partition("/")[0] in WHOLE
    rivals = (*RIVALS, "ours / megatron, remapped") if whole else RIVALS
    in_region = whole or (point.get("tokens", 0) >= MIN_TOKENS and point.get("hidden", 0) >= MIN_HIDDEN)
    for comparison, ratio in row["ratio"].items():
        low, high = ratio["low"], ratio["high"]
        if comparison in rivals:
            yield _result(key, comparison, f"not lost (interval not wholly above {LOST_ABOVE})", ratio, low <= LOST_ABOVE)
        elif comparison in FLOORS and in_region:
            rule = f"within {FLOOR_LIMIT - 1:.0%} of the floor (aim {FLOOR_AIM - 1:.0%})"
            yield _result(key, comparison, rule, ratio, ratio["median"] <= FLOOR_LIMIT)
        elif comparison == "ours / naive" and in_region and point.get("null") == 0.5 and point.get("top_k", 0) >= 2:
            rule = f"at least {NAIVE_FACTOR} times faster than the naive sender"
            yield _result(key, comparison, rule, ratio, high <= 1 / NAIVE_FACTOR)


def _judge_scaling(key: str, row: Mapping[str, Any]) -> Iterator[BenchResult]:
    if row["by"] == "tokens":
        slope = row["log-log slope of time"]
        exact = {"median": slope, "low": slope, "high": slope}
        yield _result(key, "time over tokens", f"log-log slope in {SLOPE}", exact, SLOPE[0] <= slope <= SLOPE[1])
        return
    for label, ratio in row["cost a row / the first's"].items():
        met = FLATNESS[0] <= ratio["median"] <= FLATNESS[1]
        yield _result(f"{key} {label}", "cost a row / the first's", f"within {FLATNESS}", ratio, met)


def _result(key: str, comparison: str, rule: str, ratio: Mapping[str, float], met: bool) -> BenchResult:
    known = EXPLANATIONS.get(comparison, {})
    reason = "" if met else known.get(key.partition("/")[0], known.get("", NOT_EXPLAINED))
    return BenchResult(key, comparison, rule, ratio["median"], ratio["low"], ratio["high"], met, reason)


def text(results: Mapping[str, Any]) -> str:
    """Returns the text for a terminal. Rules that do not hold come first, then rules that hold, then all rows."""
    comparisons = judge(results["rows"])
    held = [["holds", each.row, each.comparison, each.rule, _range(each)] for each in comparisons if each.met]
    parts = [*_failures(comparisons), _plain([["", "row", "comparison", "rule", "ratio"], *held]), ""]
    for title, table in tables(results):
        parts += [title, _plain(table), ""]
    return "\n".join(parts)


def markdown(results: Mapping[str, Any]) -> str:
    """Returns the judgement and the tables of docs/benchmark_tables.md."""
    comparisons = judge(results["rows"])
    holds = sum(comparison.met for comparison in comparisons)
    parts = ["### Judgement", "", f"{holds} of {len(comparisons)} comparisons hold. Those that do not:", ""]
    parts += [f"- {line}" for line in _failures(comparisons)] or ["none"]
    parts += ["", "`a / b` is the time of a over the time of b, with its 95 % interval in brackets."]
    for title, table in tables(results):
        parts += ["", f"### {title}", "", _pipes(table)]
    return "\n".join(parts) + "\n"


def _failures(comparisons: Sequence[BenchResult]) -> list[str]:
    """Returns a paragraph for each reason why a rule does not hold. It has the number of rows that fail for this reason,
    and the rows with the lowest and the highest ratio. The tables have all ratios."""
    alike: dict[tuple[str, str, str], list[BenchResult]] = {}
    for each in comparisons:
        if not each.met:
            alike.setdefault((each.comparison, each.rule, each.reason), []).append(each)
    found = []
    for (comparison, rule, reason), failed in alike.items():
        ends = sorted(failed, key=lambda each: each.ratio)
        ends = [ends[0], ends[-1]] if len(ends) > 1 else ends
        where = f"{len(failed)} rows, from" if len(failed) > 1 else "one row,"
        rows = " to ".join(f"{_range(each)} ({each.row})" for each in ends)
        found.append(f"NOT MET: {comparison} ({rule}). It fails in {where} {rows}. Why: {reason}.")
    return found


def _range(comparison: BenchResult) -> str:
    if comparison.low == comparison.high:
        return f"{comparison.ratio:.2f}"
    return f"{comparison.ratio:.2f} [{comparison.low:.2f}, {comparison.high:.2f}]"


def tables(results: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Yields title and table of each sweep, in the order of the results file. A table has our times in milliseconds, then
    paired ratios of times with their intervals."""
    sweeps: dict[str, dict[str, Any]] = {}
    for key, row in results["rows"].items():
        sweep, _, label = key.partition("/")
        sweeps.setdefault(sweep, {})[label] = row
    for sweep, rows in sweeps.items():
        if sweep == "scaling":
            for label, row in rows.items():
                yield f"Cost of a row that leaves the rank, by {label}", _scaling_table(row)
        else:
            yield _title(sweep), _ratio_table(sweep, rows)
            yield f"{_title(sweep)}: hidden rows sent by all ranks", _sent_table(sweep, rows)


def _title(sweep: str) -> str:
    return {"layer": "Whole MoE layer, forward and backward", "step": "Whole training step"}.get(sweep, f"By {sweep}")


def _ratio_table(sweep: str, rows: Mapping[str, Any]) -> Table:
    shown = [name for name in RATIOS if any(name in row["ratio"] for row in rows.values())]
    table = [[sweep, "ours, ms", *shown]]
    for label, row in rows.items():
        cells = [_ratio(row["ratio"].get(name)) for name in shown]
        table.append([label, f"{row['milliseconds']['ours']['median']:.2f}", *cells])
    return table


def _sent_table(sweep: str, rows: Mapping[str, Any]) -> Table:
    names = [name for name in ("ours", *OTHERS) if any(name in row["sent"] for row in rows.values())]
    table = [[sweep, *names, "other bytes, ours"]]
    for label, row in rows.items():
        cells = [f"{row['sent'][name]['rows']:,}" if name in row["sent"] else "" for name in names]
        table.append([label, *cells, f"{row['sent']['ours']['other_bytes']:,}"])
    return table


def _scaling_table(row: Mapping[str, Any]) -> Table:
    table = [[row["by"], "ms", "rows", "ns a row", "cost a row / the first's"]]
    for label, milliseconds in row["milliseconds"].items():
        cost, ratio = row["nanoseconds a row"][label], row["cost a row / the first's"][label]
        table.append(
            [label, f"{milliseconds['median']:.2f}", f"{row['rows'][label]:,}", f"{cost['median']:.0f}", _ratio(ratio)]
        )
    return [*table, ["slope", f"{row['log-log slope of time']:.2f}", "", "", ""]]


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _plain(table: Table) -> str:
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join(line.rstrip() for line in lines)


def _pipes(table: Table) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


# --- the picture: a line per table row, with a dot and an interval for each rival's ratio, on a logarithmic axis

ROW_HEIGHT, LABEL_WIDTH, PLOT_WIDTH, MARGIN, LEGEND = 16, 250, 420, 24, 40
COLUMNS = 2
RANGE = (0.12, 2.5)
TICKS = (0.125, 0.25, 0.5, 1.0, 2.0)
GREY, BLACK = (215, 215, 215), (20, 20, 20)
COLOURS = {name: colour for name, colour in RATIOS.items() if colour is not None}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG. A ratio left of 1 means that our time is shorter. A row is lost if a whole interval is right of the
    dotted line at LOST_ABOVE."""
    rows = [(key, row["ratio"]) for key, row in results["rows"].items() if COLOURS.keys() & row.get("ratio", {}).keys()]
    length = -(-len(rows) // COLUMNS)  # table rows in each column of the picture, rounded up
    width, height = COLUMNS * (LABEL_WIDTH + PLOT_WIDTH + MARGIN), LEGEND + MARGIN * 2 + ROW_HEIGHT * length
    picture = Image.new("RGB", (width, height), "white")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
    x = 8.0
    for name, colour in COLOURS.items():
        canvas.ellipse([(x, 12), (x + 7, 19)], fill=colour)
        canvas.text((x + 12, 8), name, fill=BLACK, font=font)
        x += 30 + font.getlength(name)
    canvas.text((8, 26), "time of ours / time of the other, median and 95 % interval", fill=BLACK, font=font)
    for column in range(COLUMNS):
        left = column * (LABEL_WIDTH + PLOT_WIDTH + MARGIN)
        for tick in TICKS:
            at = left + _x(tick)
            canvas.line([(at, LEGEND + MARGIN), (at, height - MARGIN)], fill=BLACK if tick == 1.0 else GREY)
            canvas.text((at - 8, LEGEND + 6), f"{tick:g}", fill=BLACK, font=font)
        for y in range(LEGEND + MARGIN, height - MARGIN, 4):
            canvas.point([(left + _x(LOST_ABOVE), y)], fill=BLACK)
        for number, (key, ratios) in enumerate(rows[column * length : (column + 1) * length]):
            _draw_row(canvas, font, left, LEGEND + MARGIN + ROW_HEIGHT * number, key, ratios)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _draw_row(
    canvas: ImageDraw.ImageDraw, font: Any, left: float, top: float, key: str, ratios: Mapping[str, Mapping[str, float]]
) -> None:
    canvas.text((left + 8, top + 1), key, fill=BLACK, font=font)
    shown = [name for name in COLOURS if name in ratios]
    for index, name in enumerate(shown):
        y = top + 3 + index * (ROW_HEIGHT - 4) / len(shown)  # intervals of one table row are drawn side by side
        low, middle, high = (left + _x(ratios[name][each]) for each in ("low", "median", "high"))
        canvas.line([(low, y), (high, y)], fill=COLOURS[name])
        canvas.ellipse([(middle - 2, y - 2), (middle + 2, y + 2)], fill=COLOURS[name])


def _x(ratio: float) -> float:
    low, high = (math.log(edge) for edge in RANGE)
    return LABEL_WIDTH + PLOT_WIDTH * (min(max(math.log(ratio), low), high) - low) / (high - low)
