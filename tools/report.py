"""Draws the routing of a run, or of a trace from moe_dist or another system, into one HTML file. See docs/monitoring.md."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tokenizers import Tokenizer

from moe_dist.checkpoint.directory import CheckpointDirectory, run_path
from moe_dist.config.load import load_stored_config
from moe_dist.config.parallel.section import ExplicitSection, InterleavedSection, PinnedSection
from moe_dist.config.partial import draft
from moe_dist.config.schema import Config
from moe_dist.config.trace_schema import untraceable
from moe_dist.config.yaml_text import read_mapping
from moe_dist.data.codebook import load_codebook
from moe_dist.errors import EXIT_DONE, ConfigError, DataError, MoeDistError, printable
from moe_dist.formats.manifest import load_manifest
from moe_dist.formats.tokenizer_file import limited, read_tokenizer
from moe_dist.inference.loaded_run import trained_placement
from moe_dist.monitor.report.findings import facts
from moe_dist.monitor.report.page import remarks, render
from moe_dist.monitor.report.routing import (
    FRAMES,
    Layout,
    Routing,
    Subject,
    frames_of_records,
    frames_of_trace,
    last_tokens,
    merged,
    model_shape,
    total,
)
from moe_dist.monitor.report.verdicts import headline, verdicts
from moe_dist.monitor.trace.foreign import READERS, read_foreign
from moe_dist.monitor.trace.format import MANIFEST, Manifest
from moe_dist.monitor.trace.reader import Trace, read_trace
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.plan.preflight import layout_without_data
from moe_dist.runtime.cause import line_of_cause
from moe_dist.runtime.command_line import print_done, reports_errors, run_command, takes
from moe_dist.runtime.files import make_writable, write_atomically
from moe_dist.runtime.lease import read_holder
from moe_dist.runtime.run_folder import RunFolder

MOST_BYTES = 5_000_000
MOST_RANKS = 4096
LONGEST_NAME = 80  # largest number of shown characters of a token
LARGEST_EP = 64  # largest EP size in the byte ledger, except sizes in --ep


@dataclass(frozen=True)
class ReportOptions:
    path: Annotated[Path, typer.Argument(help="A run, or the folder of a trace.")]
    against: Annotated[Path | None, typer.Option(help="Another run or trace of the same model, for the drift.")] = None
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML file of the report; by default report.html in PATH.")
    ] = None
    data: Annotated[Path | None, typer.Option(help="Folder of the run's data set, if it has moved: names of tokens.")] = (
        None
    )
    ep: Annotated[str, typer.Option(help="Further EP sizes of the byte ledger, separated by commas.")] = ""
    experts: Annotated[int, typer.Option(min=0, help="Experts of a layer, for another system's trace.")] = 0
    placement: Annotated[Path | None, typer.Option(help="YAML file with `slots`, for the byte ledger.")] = None
    node_sizes: Annotated[str, typer.Option(help="Ranks of a node in the byte ledger, separated by commas.")] = "2,4,8"
    trace: Annotated[
        bool | None,
        typer.Option(
            "--trace/--no-trace",
            help="First trace held-out tokens on this machine. Default: if a finished run on CPUs has no trace.",
        ),
    ] = None


@reports_errors("report")
@takes(ReportOptions)
def main(options: ReportOptions) -> None:
    """Draw the routing of a run or a trace."""
    draw(options)


def draw(options: ReportOptions) -> Path:
    """Writes a report, prints its findings and returns its path. Raises MoeDistError if an option or the run is wrong."""
    out = _out(options)
    sizes, node_sizes = _sizes("--ep", options.ep), _sizes("--node-sizes", options.node_sizes)
    _trace(options)
    routing = open_routing(options.path, options.data, options.experts)
    against = None
    if options.against is not None:
        against = open_routing(options.against, options.data, options.experts, option="--against")
    if against is not None and (against.groups, against.layers) != (routing.groups, routing.layers):
        raise ConfigError(
            f"--against {options.against}: it has {model_shape(against.groups, against.layers)}, but {options.path} has "
            f"{model_shape(routing.groups, routing.layers)}; compare runs of the same model"
        )
    layouts = list(_layouts(routing, sizes))
    if options.placement is not None:
        layouts.append(Layout(options.placement.name, _read_placement(options.placement, routing.groups)))
    subject = Subject(routing, against, layouts, node_sizes)
    page = page_of(subject)
    write_atomically(out, page)
    found = verdicts(routing)
    print(printable(headline(found)[1]))
    lines = [
        f"{each.subject}: {'not judged: ' * (each.state == 'few')}{'; '.join(each.text.splitlines())}" for each in found
    ]
    for sentence in (*remarks(routing), *lines, *facts(routing)):
        print(printable(f"- {sentence}"))
    print_done(f"{out}: {len(page) / 1e6:.2f} MB, steps {routing.frames[0].first} to {routing.frames[-1].last}")
    return out


def _trace(options: ReportOptions) -> None:
    """Traces held-out tokens of the run if `--trace` asks for it. Without the option, traces a finished run on CPUs that
    has no trace. If that fails, prints the reason, because the report can be drawn without a trace."""
    from tools.trace import TraceOptions, write_trace  # imported late, because few reports need it

    folder = RunFolder(options.path)
    if options.trace is None:
        traced = [*folder.path.glob(f"trace/*/{MANIFEST}"), *folder.path.glob(f"traces/*/*/{MANIFEST}")]
        latest = None if traced or not folder.config_yaml.is_file() else folder.read_status().latest
        if latest is None or latest.verdict != EXIT_DONE:
            return
        config = load_stored_config(folder.config_yaml)
        if config.parallel.device != "cpu" or config.engine.hosts or any(untraceable(config)):
            return
    elif not options.trace:
        return
    try:
        write_trace(TraceOptions(run=options.path, data=options.data))
    except MoeDistError as error:
        if options.trace:
            raise
        print(printable(f"not traced: {error}"), file=sys.stderr)


def _out(options: ReportOptions) -> Path:
    """Returns the path of the report: `--out`, else report.html in the folder of the run or trace. If that folder cannot be
    written, takes the current folder. Raises ConfigError if `--out` has another ending, or cannot be written."""
    if options.out is None:
        path = run_path(options.path)
        beside = path if path.is_dir() else path.parent
        return (beside if os.access(beside, os.W_OK | os.X_OK) else Path()) / "report.html"
    if options.out.suffix not in (".html", ".htm"):
        raise ConfigError(f"--out {options.out}: the name must end with .html, because an existing file is replaced")
    make_writable(options.out.parent, option=f"--out {options.out}")
    return options.out


def page_of(subject: Subject) -> bytes:
    """Renders the report. If the page has more than MOST_BYTES, renders it again with one range of steps instead of twelve.
    If the page is still too large, renders it without the co-activation matrices, too, and returns it even if it is larger
    than MOST_BYTES."""
    page = b""
    for fewer in ({}, {"slides": 1}, {"slides": 1, "matrix_cells": 0}):
        page = render(replace(subject, **fewer)).encode(errors="replace")  # a hint may have half a surrogate pair
        if len(page) <= MOST_BYTES:
            break
    return page


def _read_placement(path: Path, groups: tuple[ExpertGroup, ...]) -> ExpertPlacement:
    """Reads a placement from a file with the keys of the configuration section `placement` for the policy `explicit`."""
    try:
        values, problems = read_mapping(path, "policy and slots")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--placement {path}: cannot be read: {error}; give a YAML file with `slots`") from error
    read = draft(ExplicitSection, values or {})
    if problems or read.problems or read.value is None:
        faults = problems or [f"{path}: {problem}" for problem in read.problems]
        raise ConfigError([f"--placement {fault}" for fault in faults])
    return make_placement(read.value, groups, num_ranks=len(read.value.slots), token_mix={})


def _sizes(option: str, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if wrong := [word for word in words if not word.isdecimal() or not 0 < int(word) <= MOST_RANKS]:
        raise ConfigError(f"{option} {text}: {wrong[0]!r} is no whole number from 1 to {MOST_RANKS}; write them as 2,4,8")
    return tuple(dict.fromkeys(map(int, words)))


def open_routing(path: Path, data: Path | None = None, experts: int = 0, *, option: str = "") -> Routing:
    """Reads the routing of a run or trace.

    Args:
        data: Folder of the data set, if it has moved since the training.
        experts: Number of experts of a layer if `path` is the trace of another system; 0 otherwise.
        option: Option of the command line that names `path`, for error texts; empty for an argument.

    Raises:
        ConfigError: `path` is missing, or neither a run nor a trace.
        DataError: files are damaged, empty, or of different models.
    """
    path = run_path(path, "a run folder (runs/<name>) or a trace folder", option=option)
    if RunFolder(path).config_yaml.is_file() and RunFolder(path).metrics_jsonl.is_file():
        return _of_run(path, data)
    # If a trace has records beside it, another trainer trains the model; see `moe_dist.monitor.attach`.
    counted = not experts and RunFolder(path).metrics_jsonl.is_file()
    if experts:
        trace = read_foreign(path, experts)
        manifest = trace.step(trace.steps[0]).manifest
    elif any(path.glob(f"*/{MANIFEST}")) or any(path.glob(f"trace/*/{MANIFEST}")):
        trace, manifest = _open_trace(path, counted=counted)
    else:
        raise ConfigError(
            f"{path}: neither a run (config.yaml and metrics.jsonl) nor a trace (a folder with */{MANIFEST}); give one of "
            f"both, or the trace of another system ({', '.join(READERS)}) and --experts, its number of experts"
        )
    if counted:
        shape = (len(manifest.layers), manifest.num_columns, len(manifest.groups))
        frames, window, _, history = frames_of_records(RunFolder(path).metrics_jsonl, shape)
        frames, source, split = merged(frames, FRAMES), "from metrics.jsonl", "training"
    else:
        history = None
        frames, window = frames_of_trace(trace, manifest.groups, len(manifest.layers))
        part = f" ({len(frames)} of {len(trace.steps)} traced)" if len(frames) < len(trace.steps) else ""
        source, split = f"counted in the trace{part}", manifest.split
    return Routing(
        name=str(path),
        source=source,
        placement=_placement(path, manifest),
        layers=manifest.layers,
        modalities=manifest.modalities,
        frames=tuple(frames),
        window=total(window),
        window_steps=len(window),
        configuration=manifest.configuration,
        balance_coefficient=math.nan,
        tokens=last_tokens(trace, **_names(manifest.configuration, data, manifest.tokenizer)) if trace.steps else None,
        split=split,
        hints=RunFolder(path).hints(),
        history=history,
    )


def _of_run(path: Path, data: Path | None) -> Routing:
    folder = RunFolder(path)
    config = load_stored_config(folder.config_yaml)
    groups, layers = expert_groups(config.model.moe), config.model.moe_layers
    columns = sum(group.num_columns for group in groups)
    shape, names = (len(layers), columns, len(groups)), [group.name for group in groups]
    frames, window, coefficient, history = frames_of_records(folder.metrics_jsonl, shape, names)
    made = {found.parents[1] for found in (path / "traces").glob(f"*/*/{MANIFEST}")}
    places = made or ({folder.trace} if any(folder.trace.glob(f"*/{MANIFEST}")) else set())
    trace = manifest = None
    if places:
        opened = {place: _open_trace(place) for place in sorted(places)}
        place = max(opened, key=lambda each: opened[each][0].steps[-1])
        trace, manifest = opened[place]
        if (manifest.groups, manifest.layers) != (groups, layers):
            raise DataError(
                f"{place}/*/{MANIFEST}: groups and layers are {model_shape(manifest.groups, manifest.layers)}, but "
                f"{folder.config_yaml} describes {model_shape(groups, layers)}; remove the trace of the other model"
            )
    modalities = tuple(name for group in groups for name in group.modalities)
    routing = Routing(
        name=str(path),
        source="from metrics.jsonl",
        placement=_placement(path, manifest) if manifest else _placement_of_run(path, groups, config),
        layers=layers,
        modalities=manifest.modalities if manifest else modalities,
        frames=merged(frames, FRAMES),
        window=total(window),
        window_steps=len(window),
        configuration=config.model_dump(mode="json"),
        balance_coefficient=coefficient,
        tokens=None,
        hints=folder.hints(),
        history=history,
        ended=_ended(folder),
    )
    return routing if trace is None else replace(routing, tokens=last_tokens(trace, **_names(routing.configuration, data)))


def _open_trace(path: Path, *, counted: bool = False) -> tuple[Trace, Manifest]:
    """Returns a trace, and the manifest of the trace's last attempt. Raises DataError if the attempts have different
    models, or if the trace has no step. With `counted` (metrics.jsonl has the counts), the trace may have no step."""
    trace = read_trace(path)
    if not trace.steps and not counted:
        raise DataError(f"{path}: the trace has no step that all ranks wrote; train on, or give another trace")
    manifest = trace.attempts[-1].manifest
    for attempt in trace.attempts:
        if (attempt.manifest.groups, attempt.manifest.layers) != (manifest.groups, manifest.layers):
            raise DataError(
                f"{attempt.folder}/{MANIFEST}: groups and layers differ from those of {trace.attempts[-1].folder}; keep "
                "the attempts of one model in a folder"
            )
    return trace, manifest


def _placement(path: Path, manifest: Manifest) -> ExpertPlacement:
    ranks, experts = manifest.rank_of_expert, sum(group.num_experts for group in manifest.groups)
    if len(ranks) != experts or min(ranks) < 0:
        raise DataError(
            f"{path}, {MANIFEST}: rank_of_expert has {len(ranks)} ranks from {min(ranks, default=0)}, but groups have "
            f"{experts} experts, each on a rank from 0; take the manifest that belongs to this trace"
        )
    try:
        return manifest.placement
    except ConfigError as error:
        raise DataError(f"{path}, {MANIFEST}: {error}; take the manifest that belongs to this trace") from error


def _placement_of_run(path: Path, groups: tuple[ExpertGroup, ...], config: Config) -> ExpertPlacement:
    """Returns the placement in the newest checkpoint. A run without a checkpoint has its configured placement."""
    directory = CheckpointDirectory(RunFolder(path).checkpoints)
    if steps := directory.steps():
        return trained_placement(directory.path_of(max(steps)), groups)
    return layout_without_data(config).placement


def _ended(folder: RunFolder) -> str:
    """Returns a sentence on a run that still runs, or ended without being done."""
    latest, holder = folder.read_status().latest, read_holder(folder.lease_json)
    if latest is None:
        return ""
    steps = CheckpointDirectory(folder.checkpoints).steps()
    if latest.verdict is None:
        alive = holder is not None and not holder.is_dead()
        return "The run is still running." if alive else "The run died without a recorded cause."
    if cause := line_of_cause(latest, folder.hints(), max(steps, default=0)):
        return f"The run failed, {cause}."
    return "" if latest.verdict == EXIT_DONE else f"The run stopped: {latest.reason}."


def _layouts(routing: Routing, sizes: Sequence[int]) -> Iterator[Layout]:
    """Yields the run's own placement. Then yields the possible pinned and interleaved placements at the EP sizes 2, 4,
    ... and at the EP sizes `sizes`."""
    own, tokens = routing.placement, routing.tokens
    known = {1, *(2**i for i in range(1, 20) if 2**i <= min(own.num_experts, LARGEST_EP))}
    counts = np.zeros(0) if tokens is None else tokens.modality_T
    mix = {name: int((counts == m).sum()) for m, name in enumerate(routing.modalities)}
    seen = {own.slots}
    for size in sorted({*known, *sizes, own.num_ranks} - {1}):
        if size == own.num_ranks:
            yield Layout("as in the run", own)
        for section in (PinnedSection(), InterleavedSection())[len(routing.groups) == 1 :]:  # same for 1 group
            try:
                placement = make_placement(section, routing.groups, num_ranks=size, token_mix=mix)
            except ConfigError:
                continue  # the policy `pinned` needs a rank for each group
            if placement.slots not in seen:
                yield Layout(section.policy, placement)
            seen.add(placement.slots)


def _names(configuration: Any, data: Path | None, tokenizer_json: str | None = None) -> dict[str, Any]:
    """Returns the fields `name_of`, `picture_of` and `grid` of `Tokens`.

    Args:
        configuration: The stored configuration of the run; its data.path is the folder of the data set.
        data: The folder to which the data set has moved; None if it has not moved.
        tokenizer_json: The tokenizer's file, which is read if the configuration names no data set, and gives only
            `name_of`.

    Returns:
        No fields if the data set cannot be read. The report then shows token ids.

    Raises:
        ConfigError: `data` cannot be read.
    """
    try:
        if data is None and tokenizer_json and "data" not in configuration:
            alone = read_tokenizer(tokenizer_json)
            return {"name_of": _decoder(alone, f"{tokenizer_json}: fails on a token; report without this tokenizer")}
        folder = data or Path(configuration["data"]["path"])
        manifest = load_manifest(folder)
        tokenizer = read_tokenizer(folder / manifest.tokenizer) if manifest.tokenizer else None
        codes = None
        if manifest.image is not None and manifest.image.codebook is not None:
            codes = load_codebook(folder / manifest.image.codebook)
    except (MoeDistError, OSError, KeyError, TypeError) as error:  # another system's trace has no data; names are optional
        if data is not None:
            raise ConfigError(f"--data {data}: {error}") from error
        return {}
    first, end = manifest.modalities.get("image", ((0, 0),))[0]

    decode = tokenizer and _decoder(tokenizer, f"{folder}: its tokenizer fails on a token; correct it")

    def name_of(token: int) -> str | None:
        pictured = codes is not None and first <= token < end
        return decode(token) if decode and not pictured else None

    def picture_of(token: int) -> np.ndarray | None:
        return codes[token - first] if codes is not None and first <= token < min(end, first + len(codes)) else None

    return {"name_of": name_of, "picture_of": picture_of, "grid": manifest.image.grid if manifest.image else (0, 0)}


def _decoder(tokenizer: Tokenizer, problem: str) -> Callable[[int], str | None]:
    """Returns a function from a token to its first characters, or None. The function raises the errors of `limited`."""
    return cache(limited(lambda token: tokenizer.decode([token], False)[:LONGEST_NAME] or None, problem))


if __name__ == "__main__":
    run_command(main)
