"""Defines the TensorBoard sink. It writes curves, heat maps, histograms, and pages of text."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]: made at import
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]: made at import
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import FileWriter, summary

from moe_dist.monitor.compute_map import draw_map
from moe_dist.monitor.heatmaps import Axis, draw, linear_scale
from moe_dist.monitor.metrics import Record, depth_metrics
from moe_dist.monitor.pictures import Subject, change_map, heat_maps, loads
from moe_dist.monitor.routing_hints import Hint
from moe_dist.monitor.sinks.sink import Sink, SinkContext
from moe_dist.monitor.statistics import DepthStatistics, EvaluationResult
from moe_dist.monitor.tags import DEPTH_FAMILY, EVALUATION_TAGS, curve_of, meaning, picture_meaning, tag_plan

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 10  # an event is on disk after at most this many seconds
NUM_BINS = 40
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d{1,18})\..*\.(\d{1,18})")
NOISY = ("moe/", "mixture_of_depths/", "perf/", "comm/", "device/")  # prefixes of tags whose single steps vary too much
# Kind of value -> TensorBoard's plugin for this kind, and `DataClass` (1 scalar, 2 tensor, 3 blob sequence).
PLUGINS = {"simple_value": ("scalars", 1), "histo": ("histograms", 2), "image": ("images", 3)}
# Tag family of `GROUP_FAMILIES` -> title of its chart.
GROUP_CHARTS = {
    "experts_per_token": "true experts per token",
    "null_fraction": "share of choices that are null",
    "load_imbalance": "busiest expert, x the mean expert (mean over layers)",
    "capacity_used": "busiest expert of any layer, x an even share of all choices",
}


class TensorBoardSink(Sink):
    """Writes event files into the folder tensorboard of the run.

    Args:
        pictures_every: Number of steps from one heat map or histogram to the next.
        mean_over: Number of steps averaged for one point of a noisy curve (`NOISY`), because single steps vary too much.
    """

    def __init__(self, context: SinkContext, *, pictures_every: int = 100, mean_over: int = 10) -> None:
        assert context.subject is not None, "the caller says what pictures show"
        self._subject, self._pictures_every, self._mean_over = context.subject, pictures_every, mean_over
        self._recent: dict[str, list[float]] = {}  # tag -> values of the steps since the last point of its curve
        self._first_step, self._last_step = context.resume_step + 1, context.resume_step
        self._window = Window()
        self._folder, self._closed = context.folder / "tensorboard", False
        for each in (self._folder, *(path for path in self._folder.glob("*") if path.is_dir())):
            drop_events_after(each, context.resume_step, evaluation_owed=context.evaluation_owed)
        self._writers: dict[str, FileWriter] = {}  # sub-run -> writer; '' is the main run
        self._described: set[tuple[str, str]] = set()
        self._writer("").add_summary(summary.custom_scalars(layout(context.subject, context.modalities)), self._first_step)

    def step(self, record: Record) -> None:
        self._add({tag: number for tag, number in record.scalars.items() if not tag.startswith(NOISY)}, record.step)
        for tag, number in record.scalars.items():
            if tag.startswith(NOISY) and number is not None:
                self._recent.setdefault(tag, []).append(number)
        self._last_step = record.step
        for each in record.levers:
            self._writer("").add_summary(summary.text(f"rank_balance/{each.lever}", each.text), record.step)
            if each.placement is not None:
                words = f"the choices of step {record.step}"
                picture = change_map(record.arrays["choices_LC"], self._subject, each.placement, words)
                self._add_picture(summary.image("rank_balance/change", picture, dataformats="HWC"), record.step)
                self._subject = replace(self._subject, placement=each.placement)  # for all later pictures
        if record.step % self._mean_over == 0:
            self._add_means()
        self._window.add(record)
        if record.step % self._pictures_every == 0:
            self._add_pictures()

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        self._add(scalars, result.step)
        if result.compute_map is not None:
            picture = draw_map(result.compute_map, title=f"Compute map after step {result.step}")
            self._add_picture(summary.image("moe/compute_map", picture, dataformats="HWC"), result.step)

    def hint(self, hint: Hint, step: int) -> None:
        self._writer("").add_summary(summary.text(f"hint/{hint.kind}", hint.text), step)

    def text(self, tag: str, markdown: str) -> None:
        # The text belongs to the attempt's first step. A later resume from an earlier step thus removes the text, too.
        self._writer("").add_summary(summary.text(tag, markdown), self._first_step)

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        if self._closed:
            return
        self._add_means()
        if self._window:
            self._add_pictures()
        for writer in self._writers.values():
            writer.close()
        self._closed = True

    def _writer(self, sub_run: str) -> FileWriter:
        """Returns the writer of a sub-run, which is opened at the first value of this sub-run. Each writer has a thread."""
        if self._closed:
            raise RuntimeError("TensorBoardSink: used after close()")
        if sub_run not in self._writers:
            self._writers[sub_run] = FileWriter(str(self._folder / sub_run), flush_secs=FLUSH_SECONDS)
        return self._writers[sub_run]

    def _add(self, scalars: Mapping[str, float | None], step: int) -> None:
        curves: dict[str, list[Any]] = {}
        for tag, number in scalars.items():
            if number is not None:
                sub_run, shown = curve_of(tag)
                value = summary.scalar(shown, number).value[0]
                curves.setdefault(sub_run, []).append(self._with_meaning(value, sub_run, meaning(tag)))
        for sub_run, values in curves.items():  # one event per sub-run takes fewer bytes than one per scalar
            self._writer(sub_run).add_summary(Summary(value=values), step)

    def _add_means(self) -> None:
        self._add({tag: fmean(numbers) for tag, numbers in self._recent.items()}, self._last_step)
        self._recent.clear()

    def _with_meaning(self, value: Any, sub_run: str, text: str) -> Any:
        """Adds the description `text` if no earlier value has this tag, because TensorBoard ignores later descriptions."""
        if (sub_run, value.tag) not in self._described:
            plugin, data_class = PLUGINS[value.WhichOneof("value")]
            value.metadata.summary_description = text
            value.metadata.plugin_data.plugin_name = plugin  # without name and data_class, TensorBoard drops the text
            value.metadata.data_class = data_class
            self._described.add((sub_run, value.tag))
        return value

    def _add_picture(self, shown: Any, step: int | None = None) -> None:
        self._with_meaning(shown.value[0], "", picture_meaning(shown.value[0].tag))
        self._writer("").add_summary(shown, self._last_step if step is None else step)

    def _add_pictures(self) -> None:
        depths = ("mixture_of_depths/layers", self._window.depth_map())
        sums, steps = self._window.take()
        for tag, picture in (depths, *heat_maps(sums, self._subject, steps)):
            if picture is not None:
                self._add_picture(summary.image(tag, picture, dataformats="HWC"))
        for group, load_Ln in loads(sums["choices_LC"], self._subject.groups):
            known = load_Ln[~np.isnan(load_Ln)]
            if known.size:
                # The bins are fixed. With one extreme load, numpy's automatic number of bins would have no bound.
                bins = np.linspace(0.0, max(4.0, float(known.max())), NUM_BINS + 1)
                self._add_picture(summary.histogram(f"moe/load_histogram/{group.name}", known, bins=bins))
        for tag, value_W in self._window.by_rank.items():
            bins = np.linspace(0.0, max(1e-9, 1.2 * float(value_W.max())), NUM_BINS + 1)
            self._add_picture(summary.histogram(tag, value_W, bins=bins))


class Window:
    """Sums the arrays of records over consecutive steps."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._steps: list[int] = []
        self._depths: DepthStatistics | None = None
        # those arrays of the last record that have a value for each rank; empty with a single rank
        self.by_rank: dict[str, np.ndarray] = {}

    def add(self, record: Record) -> None:
        tokens_LG = record.arrays["tokens_LG"]
        names = ("choices_LC", "tokens_LG", "dropped_LG", "weighted_rows_LR", "idle_LG")
        arrays = {name: record.arrays[name] for name in names if name in record.arrays}
        if record.load:
            arrays["aimed_LG"] = record.target_G * tokens_LG
        # Mean entropy x tokens. A group without tokens has nan, which must not enter the sum.
        arrays["entropy_sum_LG"] = np.where(tokens_LG > 0, record.arrays["entropy_LG"] * tokens_LG, 0.0)
        self._sums = {name: self._sums.get(name, 0) + array for name, array in arrays.items()}
        self._steps.append(record.step)
        if len(record.busy_seconds_W) > 1:
            self.by_rank = {"perf/rank_seconds": record.busy_seconds_W, "device/rank_memory": record.memory_W3[:, 1]}
        self._depths = _sum_depths(self._depths, record.mixture_of_depths)

    def depth_map(self) -> np.ndarray | None:
        """Draws a heat map with a row for each mixture-of-depths layer. Returns None without such layers."""
        if self._depths is None:
            return None
        metrics = depth_metrics(self._depths)
        names, columns = ["all tokens", *self._depths.groups], [metrics["computed"], *metrics["computed_by_group"].T]
        for name in ("agreement", "gate_weight"):
            if name in metrics:
                names, columns = [*names, name.replace("_", " ")], [*columns, metrics[name]]
        caption = (
            f"share of tokens computed, target {self._depths.token_share:g}; agreement and gate weight; {self._words()}"
        )
        rows = Axis("layer", [str(layer) for layer in self._depths.layers])
        scale, values = linear_scale(caption, 1.0), np.stack(columns, axis=1)
        return draw(values, rows, Axis("", names), scale=scale, title="Mixture of depths")

    def take(self) -> tuple[dict[str, np.ndarray], str]:
        """Returns the sums, and a text that names their steps. Empties the window."""
        taken = self._sums, self._words()
        self._sums, self._steps, self._depths = {}, [], None
        return taken

    def _words(self) -> str:
        first, last = self._steps[0], self._steps[-1]
        return f"step {first}" if first == last else f"steps {first} to {last}"

    def __bool__(self) -> bool:
        return bool(self._steps)


def _sum_depths(sums: DepthStatistics | None, depths: DepthStatistics | None) -> DepthStatistics | None:
    """Adds the counts of two steps. All other fields are equal in all steps of a run."""
    if sums is None or depths is None:
        return depths
    counted = ("tokens_LG", "taken_LG", "agreed_L", "weight_L")
    return replace(sums, **{name: getattr(sums, name) + getattr(depths, name) for name in counted})


def layout(subject: Subject, modalities: tuple[str, ...]) -> dict[str, dict[str, list[str | list[str]]]]:
    """Returns the custom scalars page: category -> chart title -> chart type, and regular expressions of its tags."""
    plan = tag_plan(len(subject.groups), len(modalities), mixture_of_depths=subject.mixture_of_depths)

    def shown(tag: str) -> str:
        return curve_of(tag)[1]

    def chart(*tags: str) -> list[str | list[str]]:
        return ["Multiline", list(dict.fromkeys(tags))]  # the curves of all sub-runs have the same tag

    def by_group(tag: str) -> list[str | list[str]]:
        split = tag.split("/")[1] in plan.by_group
        return chart(*(shown(f"{tag}/{name}") for name in ([g.name for g in subject.groups] if split else ["mean"])))

    losses = [shown(f"loss/{name}") for name in modalities] if plan.loss_per_modality else []
    mixture_of_depths = {
        "share of tokens computed": by_group(f"mixture_of_depths/{DEPTH_FAMILY}"),
        "held-out share of tokens computed, over the target": chart("mixture_of_depths/load_over_target"),
        "agreement of the causal decision with the selection of training": chart("mixture_of_depths/agreement"),
        "gate weight of a computed token": chart("mixture_of_depths/gate_weight"),
    }
    return {
        "Is it learning?": {
            "training loss, nats per token": chart(shown("loss/total"), *losses),
            "held-out loss, nats per token": chart("eval/.*"),
            "gradient norm": chart("optim/grad_norm"),
        },
        "Where do the tokens go?": {words: by_group(f"moe/{family}") for family, words in GROUP_CHARTS.items()}
        | {
            "share of the (token, expert) pairs that a capacity dropped": chart(shown("moe/dropped_share")),
            "experts that no token chose": chart("moe/dead_experts"),
            "work of the busiest rank, over the mean rank's": chart("moe/rank_imbalance"),
        },
        **({"Which tokens skip layers?": mixture_of_depths} if subject.mixture_of_depths else {}),
        "What does it cost?": {
            "tokens per second": chart(shown("perf/tokens_per_second")),
            "balance efficiency": chart("perf/balance_efficiency", "moe/balance_efficiency_by_count"),
            "bytes sent, and the additional bytes of other methods": chart(
                "comm/bytes_sent", "comm/bytes_saved_vs_topk", "comm/bytes_saved_vs_same_active"
            ),
            "seconds per step, and seconds in collectives": chart("perf/step_seconds", "comm/seconds"),
            "deduplication factor of rows": chart("comm/dedup_factor"),
            "device memory, MiB": chart("device/memory"),
        },
    }


def drop_events_after(folder: str | Path, step: int, *, evaluation_owed: bool = False) -> None:
    """Drops the events of steps after `step` from all event files in `folder`. `evaluation_owed` also drops the evaluation
    of `step`, because the resumed run repeats it. One rename replaces each event file.

    TensorBoard's own mark (`purge_step`) does not help, because its fast server ignores it and shows both attempts. Files
    are read from the newest to the oldest, up to the first file that needs no cut: an earlier resume has cut all older
    files. For 100,000 steps this takes about ten seconds.
    """
    for path in sorted(Path(folder).glob("events.out.tfevents.*"), key=_began_at, reverse=True):
        if _cut(path, step, evaluation_owed):
            return


def _cut(path: Path, step: int, evaluation_owed: bool) -> bool:
    """Drops the events of steps after `step` from one file, as `drop_events_after` describes. Returns True if the file has
    steps and none of its events was dropped."""
    kept_path = path.with_name("kept")  # TensorBoard reads only files with "tfevents" in their names
    kept_steps = dropped = False
    with kept_path.open("wb") as file:
        writer = RecordWriter(file)
        for raw, event in _events(path):
            values = event.summary.value
            evaluation = bool(values) and values[0].tag.startswith(EVALUATION_TAGS)  # an event is a step or an evaluation
            if event.step > step or (evaluation_owed and event.step == step and evaluation):
                dropped = True
            else:
                kept_steps |= event.step > 0  # a file begins with an event of step 0
                writer.write(raw)
        file.flush()
        os.fsync(file.fileno())  # the content must be on disk before the rename
    os.replace(kept_path, path)  # even if no event is dropped: a suspended earlier writer then writes to a deleted file
    return kept_steps and not dropped


def _events(path: Path) -> Iterator[tuple[bytes, Event]]:
    """Yields the events of a file. At a damaged event it ends and logs an error; at an incomplete one it only ends."""
    try:
        for raw in RawEventFileLoader(str(path)).Load():
            yield raw, Event.FromString(raw)
    except (DecodeError, MemoryError, OverflowError) as error:  # a damaged length may be any number
        logger.error("%s: an event is damaged (%r); TensorBoard loses it and all later events of this file", path, error)


def _began_at(path: Path) -> tuple[int, int]:
    """Returns a sort key of the name events.out.tfevents.<seconds>.<host>.<pid>.<count>. The host may contain dots. A file
    of another name counts as the oldest."""
    found = _EVENT_FILE.fullmatch(path.name)
    return (int(found[1]), int(found[2])) if found else (0, 0)
