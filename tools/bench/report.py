"""Results as text, as Markdown for the docs, and as a picture."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from tools.bench.judgement import LOST_ABOVE, Finding, judge

Table = list[list[str]]
SHOWN_RATIOS = (
    "dispatch, combine / floor",
    "dispatch, combine / floor, all",
    "ours at rank / floor",
    "ours at rank / floor, all",
    "ours / megatron",
    "ours / megatron, capacity",
    "ours / megatron, remapped",
    "ours / naive",
    "ours / per pair",
    "ours / equal active",
)


def text(results: Mapping[str, Any]) -> str:
    """Everything for a terminal: the judgement with the rows that are lost first, then all rows."""
    parts = [_plain(_findings_table(judge(results["rows"]))), ""]
    for title, table in tables(results):
        parts += [title, _plain(table), ""]
    return "\n".join(parts)


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of docs/benchmarks.md."""
    findings = judge(results["rows"])
    failed = [finding for finding in findings if not finding.met]
    parts = ["### Judgement", ""]
    parts += [f"{len(findings) - len(failed)} of {len(findings)} comparisons hold. Those that do not:", ""]
    parts += [_pipes(_findings_table(failed)) if failed else "none", ""]
    for title, table in tables(results):
        parts += [f"### {title}", "", _pipes(table), ""]
    return "\n".join(parts).rstrip() + "\n"


def tables(results: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """One table a sweep, in the file's order: milliseconds of ours, then paired ratios with their intervals."""
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
    shown = [name for name in SHOWN_RATIOS if any(name in row["ratio"] for row in rows.values())]
    table = [[sweep, "ours, ms", *shown]]
    for label, row in rows.items():
        cells = [_ratio(row["ratio"].get(name)) for name in shown]
        table.append([label, f"{row['milliseconds']['ours']['median']:.2f}", *cells])
    return table


def _sent_table(sweep: str, rows: Mapping[str, Any]) -> Table:
    names = [name for name in ("ours", "megatron", "megatron, capacity", "megatron, remapped", "naive", "per pair",
                               "equal active") if any(name in row["sent"] for row in rows.values())]  # fmt: skip
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


def _findings_table(findings: Sequence[Finding]) -> Table:
    table = [["", "row", "comparison", "rule", "ratio", "reason"]]
    for each in findings:
        interval = f"{each.ratio:.2f} [{each.low:.2f}, {each.high:.2f}]"
        table.append(["holds" if each.met else "NOT MET", each.row, each.comparison, each.rule, interval, each.reason])
    return table


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _plain(table: Table) -> str:
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join(line.rstrip() for line in lines)


def _pipes(table: Table) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


# --- the picture: every paired ratio as a dot with its interval, on a log axis

ROW_HEIGHT, LABEL_WIDTH, PLOT_WIDTH, MARGIN = 18, 420, 620, 30
RANGE = (0.05, 4.0)
TICKS = (0.1, 0.25, 0.5, 1.0, 2.0)
GREEN, RED, GREY, BLACK = (40, 120, 60), (190, 40, 40), (205, 205, 205), (20, 20, 20)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG. Left of 1 ours is faster; red are rows that are lost."""
    lines = [
        (f"{key}  {name}", ratio)
        for key, row in results["rows"].items()
        for name, ratio in row.get("ratio", {}).items()
        if name in SHOWN_RATIOS
    ]
    height = MARGIN * 2 + ROW_HEIGHT * (len(lines) + 1)
    picture = Image.new("RGB", (LABEL_WIDTH + PLOT_WIDTH + MARGIN, height), "white")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
    for tick in TICKS:
        x = _x(tick)
        canvas.line([(x, MARGIN), (x, height - MARGIN)], fill=BLACK if tick == 1.0 else GREY)
        canvas.text((x - 8, 10), f"{tick:g}", fill=BLACK, font=font)
    canvas.text((8, 10), "time of ours / time of the other, median and 95 % interval", fill=BLACK, font=font)
    for number, (label, ratio) in enumerate(lines):
        y = MARGIN + ROW_HEIGHT * number + ROW_HEIGHT // 2
        colour = RED if ratio["low"] > LOST_ABOVE else GREEN if ratio["high"] < 1.0 else BLACK
        canvas.text((8, y - 7), label, fill=BLACK, font=font)
        canvas.line([(_x(ratio["low"]), y), (_x(ratio["high"]), y)], fill=colour, width=2)
        middle = _x(ratio["median"])
        canvas.ellipse([(middle - 3, y - 3), (middle + 3, y + 3)], fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _x(ratio: float) -> float:
    low, high = (math.log(edge) for edge in RANGE)
    return LABEL_WIDTH + PLOT_WIDTH * (min(max(math.log(ratio), low), high) - low) / (high - low)
