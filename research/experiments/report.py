"""Writes the results of an experiment (verdicts, tables and plots) into a page beside the experiment's records.

The page has a section between two comments, which each report rewrites. Results of an earlier attempt under other rules
have their own section, which no report rewrites. Text that people write behind a section is kept.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any, Literal

from moe_dist.errors import DataError
from moe_dist.runtime.files import write_atomically
from research.experiments.code_versions import short_name, tell_versions
from research.experiments.plots import draw
from research.experiments.results import read_header, read_records, results_path
from research.experiments.rules import EtaValue
from research.experiments.study import Study, jobs_of
from research.experiments.verdict_figure import draw_verdicts
from research.experiments.verdicts import Record, Records, Verdict, judge, judge_gates, number_at, numbers, of_arm, value_of

CONSTANT = 0.05  # the bins of an arm are not shown if the loads in the bins differ by at most this
SAME_ROWS = 0.02  # arms count as alike if their numbers of rows per token differ by at most this
TWICE = "-twice"  # end of the name of a source that has twice as many documents of the same kind
LOSSES = ("all", "text", "image", "image_no_filler")
ROWS = {
    "rows_remote": "one row a (token, rank)",
    "rows_per_pair": "one row a (token, expert)",
    "rows_topk": "naive top-k of the same k",
    "rows_same_active": "top-k at equal active experts",
    "rows_null_remapped": "nulls sent to true experts",
}


def write_report(study: Study, *, page: Path | None = None, results: Path | None = None) -> str:
    """Writes the experiment's section from the existing records, and returns the verdicts as text.

    Raises:
        DataError: the records are damaged.
    """
    path = results or results_path(study, pilot=False)
    page = page or path.with_name(f"{study.name}.md")
    header, records = read_header(path), read_records(path)
    if header is None:
        return f"{study.name}: no results yet; python -m research.experiments {study.name} makes them"
    verdicts = judge(study, records)
    pictures = draw(study, records, path.parent)
    pictures += draw_verdicts(study, records, verdicts, path.parent / f"{study.name}_verdicts.svg")
    text = "\n".join(_section(study, header, records, verdicts, [each.name for each in pictures]))
    write_atomically(page, _replaced(page, study, header, text))
    return "\n".join(f"{each.outcome}: {each.rule.claim} {numbers(each)}" for each in verdicts)


def _replaced(path: Path, study: Study, header: Mapping[str, Any], text: str) -> str:
    page = path.read_text() if path.is_file() else ""
    begin, end = (f"<!-- {word} {study.name} {header['fingerprint']} -->" for word in ("begin", "end"))
    section = f"{begin}\n{text}\n{end}\n"
    if begin not in page:
        return f"{page.rstrip()}\n\n{section}".lstrip()
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}\n?", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise DataError(f"{path}: {begin} has no {end}, or stands twice; mend it, it is written by this tool alone")
    return pattern.sub(lambda _: section, page)


def _section(
    study: Study, header: Mapping[str, Any], records: Records, verdicts: Sequence[Verdict], pictures: Sequence[str]
) -> list[str]:
    jobs = jobs_of(study)
    done = sum((job.label, job.seed) in records for job in jobs)
    lines = [f"# {study.name}", "", study.question.strip(), ""]
    fewer = any(arm.seeds == "other" for arm in study.arms.values())
    others = f"; some arms have only the first {len(study.seeds.other)}" if fewer else ""
    lines += [
        f"The rules are in research/configs/reproduce/{study.name}.yaml, of commit `{str(header['rules'])[:12]}`. {done} "
        f"of {len(jobs)} runs are finished. The runs used the code of {commits(records.values())}. The seeds are "
        f"{', '.join(map(str, study.seeds.decisive))}{others}. The file {study.name}.jsonl.gz has the records of all runs. "
        f"`make reproduce-{study.name}` trains the missing runs. It then writes this page from all records.",
        "",
    ]
    if versions := tell_versions(study, records):
        lines += [versions, ""]
    by = "Load of text / image tokens, by"
    parts = {
        "Gates": _verdicts(study, judge_gates(study, records)),
        "Verdicts": _verdicts(study, verdicts),
        "Arms": _arms(study, records),
        "Answers": _answers(study, records),
        "Domains": _domains(study, records),
        "Questions": _questions(study, records),
        "Rows on the wire": _wire(study, records),
        "Load": _loads(study, records),
        "Changed afterwards": _probes(study, records),
        "eta": _etas(study, records, "heldout"),
        "eta of the training loss": _etas(study, records, "training"),
        f"{by} their loss": _bins(study, records, "load_by_loss"),
        f"{by} how often their id stands in the training data": _bins(study, records, "load_by_frequency"),
    }
    for title, part in parts.items():
        if part:
            lines += [f"## {title}", "", *part, ""]
    return [*lines, *(line for name in pictures for line in (f"![{name}]({name})", ""))][:-1]


def _per_arm(study: Study, records: Records) -> list[tuple[str, dict[int, Record]]]:
    """Returns each arm that has records, with the arm's records by seed."""
    return [(name, mine) for name in study.arms if (mine := of_arm(records, name))]


def _label(study: Study, arm: str) -> str:
    return f"{study.names[arm]} (`{arm}`)" if arm in study.names else f"`{arm}`"


def _verdicts(study: Study, verdicts: Sequence[Verdict]) -> list[str]:
    if not verdicts:
        return []
    bounds = f"one-sided {100 * study.confidence:.3g} % bounds"
    rows = [[each.rule.claim, numbers(each), f"**{each.outcome}**"] for each in verdicts]
    return table(["claim", f"mean difference, {bounds}, seeds", "verdict"], rows)


def _arms(study: Study, records: Records) -> list[str]:
    rows = []
    for name, mine in _per_arm(study, records):
        rows.append(
            [
                f"`{name}`",
                study.arms[name].about,
                str(len(mine)),
                *(_spread(mine, f"loss.{part}") for part in LOSSES),
                _spread(mine, "load.all", digits=3),
                f"{_mean(each['flops'] for each in mine.values()) / 1e12:.2f}",
                f"{_mean(each['seconds'] for each in mine.values()):.0f}",
                f"{_mean(each['tokens'] / each['seconds'] for each in mine.values()):,.0f}",
                f"{sent / 1e9:.2f}" if (sent := _mean(each.get("bytes", 0.0) for each in mine.values())) else "-",
            ]
        )
    heads = ["arm", "what", "seeds", *(f"{part.replace('_', ' ')}, nats" for part in LOSSES)]
    missing = [f"`{name}` ({arm.about})" for name, arm in study.arms.items() if not of_arm(records, name)]
    lines = table(*_compact([*heads, "true experts a token", "TFLOP", "seconds", "tokens/s", "GB sent"], rows))
    return [*lines, "", f"These arms have no run: {'; '.join(missing)}."] if missing else lines


def _compact(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Returns heads and rows without the columns that have no value in any row, or equal the column before them."""
    columns = [[head, *cells] for head, *cells in zip(heads, *rows, strict=True)]
    kept = [
        column
        for before, column in zip([[""], *columns], columns, strict=False)
        if column[1:] != before[1:] and set(column[1:]) != {"-"}
    ]
    head, *others = (list(row) for row in zip(*kept, strict=True))
    return head, others


def _answers(study: Study, records: Records) -> list[str]:
    """Returns a table of the fraction of held-out documents with a right answer: the mean over sources, and the fraction
    for each source. If the records have them (since mole-2), also returns the nats of an answer."""
    sources = _parts(records, "answers", "by_source")
    metrics = {"accuracy": "answers.accuracy"}
    if any("nats" in each.get("answers", {}) for each in records.values()):
        metrics["nats of an answer"] = "answers.nats"
    kinds = dict.fromkeys(source.removesuffix(TWICE) for source in sources)
    rows = []
    for name, mine in _per_arm(study, records):
        twice = TWICE if any(source.endswith(TWICE) for source in _parts(mine, "answers", "by_source")) else ""
        metrics |= {kind: f"answers.by_source.{kind}{twice}.accuracy" for kind in kinds}
        rows.append([_label(study, name), *(_spread(mine, metric) for metric in metrics.values())])
    return table(["arm", *metrics], rows) if sources else []


def _domains(study: Study, records: Records) -> list[str]:
    """Returns a table of the accuracies of the domain probe, and of the bits that the choices tell about the domain."""
    rows = []
    for name, every in _per_arm(study, records):
        if mine := {seed: record for seed, record in every.items() if "domains" in record}:
            cells = []
            for key in ("by_layer", "bits_by_layer"):
                layers = zip(*(each["domains"][key] for each in mine.values()), strict=True)
                cells.append(" ".join(f"{_mean(layer):.3f}" for layer in layers))
            rows.append([_label(study, name), *cells])
    about = (
        "A domain is a data source. *Probe* is the share of held-out tokens whose domain a linear classifier predicts "
        "right from the router's input. *Bits* is the mutual information between the domain and a token's expert of "
        "largest weight, over the tokens that predict a scored token."
    )
    return [about, "", *table(["arm", "probe, by layer", "bits, by layer"], rows)] if rows else []


def _questions(study: Study, records: Records) -> list[str]:
    """Returns a table of the fraction of right answers. For arms with an oracle, it also has the fraction after the routing
    was fitted to the labels."""
    tasks = _parts(records, "questions", "by_task")
    shown = (
        ("questions", "accuracy", "{}"),
        ("oracle", "before", "{}, the first questions"),
        ("oracle", "accuracy", "{}, these with routing fitted to their labels"),
        ("disturbed.questions", "accuracy", "{}, with disturbed routers"),
        ("disturbed.oracle", "before", "{}, disturbed, the first questions"),
        ("disturbed.oracle", "accuracy", "{}, disturbed, these with routing fitted to their labels"),
    )
    rows = []
    for name, every in _per_arm(study, records):
        for kind, value, what in shown:
            if mine := {seed: record for seed, record in every.items() if number_at(record, f"{kind}.{value}") is not None}:
                count = int(number_at(next(iter(mine.values())), f"{kind}.questions") or 0)
                cells = [_spread(mine, f"{kind}.by_task.{task}.{value}", digits=3) for task in tasks]
                rows.append([what.format(_label(study, name)), f"{count:,}", _spread(mine, f"{kind}.{value}"), *cells])
    if not rows:
        return []
    by_first = study.measure.questions is not None and study.measure.questions.first_token
    how = "whose first token has the highest logit" if by_first else "with the highest log-likelihood per token"
    about = (
        "The table has the share of right answers to held-out questions of four choices. The model's answer is the choice "
        f"{how}. *accuracy* is the mean over the tasks."
    )
    return [about, "", *table(["arm", "questions", "accuracy", *tasks], rows)]


def _parts(records: Mapping[Any, Record], kind: str, by: str) -> list[str]:
    """Returns the sources or tasks that occur in any record, in the order of the records."""
    return list(dict.fromkeys(name for record in records.values() for name in record.get(kind, {}).get(by, ())))


def _wire(study: Study, records: Records) -> list[str]:
    """Returns a table of the sent rows, without columns in which all arms are alike. It is empty if no column is left."""
    wire = study.measure.wire
    means = {
        _label(study, name): [_mean(each["wire"][key] for each in mine.values()) for key in ROWS]
        for name, mine in _per_arm(study, records)
        if any(each["wire"][key] for each in mine.values() for key in ROWS)
    }
    columns = dict(zip(ROWS.values(), zip(*means.values(), strict=True), strict=False))
    shown = [what for what, column in columns.items() if max(column) - min(column) > SAME_ROWS]
    alike = [f"{what}, {_mean(column):.2f}" for what, column in columns.items() if what not in shown]
    if not shown:
        return []
    lines = [
        "The table has the rows that this system sends in one forward pass, per token and layer, and the rows that other "
        "dispatchers would send for the same choices. The rows are computed from the routing of the held-out tokens, for "
        f"EP = {wire.ep} and {wire.placement} experts."
        + (f" All arms have the same number of these rows: {'; '.join(alike)}." if alike else ""),
        "",
    ]
    rows = [[arm, *(f"{columns[what][place]:.3f}" for what in shown)] for place, arm in enumerate(means)]
    return [*lines, *table(["arm", *shown], rows)]


def _loads(study: Study, records: Records) -> list[str]:
    """Returns a table of loads, for the arms in which different tokens take different numbers of experts."""
    kinds = ("text", "image", "image_drawn", "image_filler")
    rows = []
    for name, mine in _per_arm(study, records):
        if not any(value % 1 for each in mine.values() for value in [*each["load"]["by_layer"], each["load"]["idle"]]):
            continue  # in each layer all tokens take equally many experts, as the table of arms shows
        metrics = [f"load.{by}.{kind}" for by in ("by_input", "by_label") for kind in kinds]
        cells = [_spread(mine, metric, digits=3, plain=True) for metric in metrics]
        layers = " ".join(f"{_mean(v):.2f}" for v in zip(*(e["load"]["by_layer"] for e in mine.values()), strict=True))
        rows.append([_label(study, name), layers, f"{_mean(each['load']['idle'] for each in mine.values()):.3f}", *cells])
    heads = [f"{kind.replace('_', ' ')} ({of})" for of in ("token", "next") for kind in kinds]
    return table(["arm", "by layer", "no expert", *heads], rows) if rows else []


def _probes(study: Study, records: Records) -> list[str]:
    rows = []
    for name, mine in _per_arm(study, records):
        found: dict[tuple[str, float], list[tuple[float, float]]] = {}  # (probe, setting) -> (rise, load) of each seed
        for each in mine.values():
            for kind, points in each.get("probes", {}).items():
                for point in points:
                    rise = point["loss"]["all"] - each["loss"]["all"]
                    found.setdefault((kind, point["at"]), []).append((rise, point["load"]))
        for (kind, at), pairs in sorted(found.items()):
            rise, load = (_mean(values) for values in zip(*pairs, strict=True))
            rows.append([_label(study, name), kind, f"{at:g}", f"{load:.3f}", f"{rise:+.4f}"])
    heads = ["arm", "change", "at", "true experts a token", "held-out loss over unchanged, nats"]
    return table(heads, rows) if rows else []


def _etas(study: Study, records: Records, loss: Literal["heldout", "training"]) -> list[str]:
    """Returns a table of eta (see `EtaValue`) for all labels and for each modality: its geometric mean, and its smallest
    and largest value over seeds. The table is empty if no record has the losses."""
    if (dense := study.reference) is None:
        return []
    costs: dict[str, Literal["flops", "seconds", "bytes"]] = {"FLOPs": "flops", "seconds": "seconds"}
    if all(record.get("bytes") for record in of_arm(records, dense).values()):  # a single rank sends no bytes
        costs["bytes"] = "bytes"
    rows = []
    for name in study.with_whole_cost():
        cells = []
        for cost in costs.values():
            for part in ("all", "text", "image"):
                value = EtaValue(eta=name, of=dense, part=part, cost=cost, loss=loss)
                seeds = sorted({seed for arm, seed in records if arm == name} & {s for arm, s in records if arm == dense})
                logs = [value_of(value, records, seed) for seed in seeds]
                # If the eta of any seed is unknown, no mean is shown: leaving out this seed would bias the mean.
                cells.append(_eta([log for log in logs if log is not None] if None not in logs else []))
        if name != dense and any(cell != "-" for cell in cells):
            rows.append([_label(study, name), *cells])
    if loss == "training" and not rows:
        return []
    heads = [f"{part}, {cost}" for cost in costs for part in ("all", "text", "image")]
    return [
        f"The table has each arm's eta over `{dense}`, with the lowest and the highest value among the seeds in brackets. "
        "Arms that begin with another arm's weights have no value, because the training of these weights is not counted.",
        "",
        *table(["arm", *heads], rows),
    ]


def _eta(logs: Sequence[float]) -> str:
    if not logs:
        return "-"
    return f"{math.exp(_mean(logs)):.2f} [{math.exp(min(logs)):.2f}, {math.exp(max(logs)):.2f}]"


def _bins(study: Study, records: Records, key: str) -> list[str]:
    """Returns a table of the mean number of true experts per token in each bin, for arms in which this number varies."""
    rows = []
    for name, mine in _per_arm(study, records):
        tables = [each[key] for each in mine.values() if each.get(key) and each["load"]["all"] % 1]
        if not tables:
            continue
        cells, loads = [], {"text": [], "image": []}
        for bins in zip(*tables, strict=False):  # some seeds may have fewer bins, because `binned` merges equal bins
            both = []
            for modality in ("text", "image"):
                found = [row[modality]["load"] for row in bins if row[modality]["tokens"]]
                both.append(f"{_mean(found):.2f}" if found else "-")
                loads[modality] += [_mean(found)] if found else []
            cells.append(" / ".join(both))
        if not any(max(each) - min(each) > CONSTANT for each in loads.values() if each):
            continue
        rows.append([_label(study, name), *cells])
    most = max(map(len, rows), default=0)
    heads = ["arm", *(f"bin {place}" for place in range(1, most))]
    return table(heads, [[*row, *["-"] * (most - len(row))] for row in rows]) if rows else []


def _spread(mine: Mapping[int, Mapping[str, Any]], metric: str, *, digits: int = 4, plain: bool = False) -> str:
    values = [value for each in mine.values() if (value := number_at(each, metric)) is not None]
    if not values:
        return "-"
    spread = "" if plain or len(values) < 2 else f" ± {stdev(values):.{digits}f}"
    return f"{_mean(values):.{digits}f}{spread}"


def commits(records: Iterable[Mapping[str, Any]]) -> str:
    codes = {(short_name(each["code"]), each["code"]["changed"]) for each in records}
    return ", ".join(f"{code}{' with changes' if changed else ''}" for code, changed in sorted(codes))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(each) + " |" for each in lines]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
