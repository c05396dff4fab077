"""TensorBoard: curves, heat maps of where tokens are routed, histograms, and pages of text."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]: made at import
from torch.utils.tensorboard import FileWriter, summary

from moe_dist.monitor.curves import draw_against_targets
from moe_dist.monitor.heatmaps import Axis, draw, linear_scale
from moe_dist.monitor.metrics import Record, depth_metrics
from moe_dist.monitor.pictures import Subject, heat_maps, loads
from moe_dist.monitor.sinks.event_files import drop_events_after
from moe_dist.monitor.sinks.sink import Sink
from moe_dist.monitor.statistics import DepthStatistics, EvaluationResult
from moe_dist.monitor.tags import DEPTH_FAMILY, GROUP_FAMILIES, tag_plan

FLUSH_SECONDS = 10  # maximum age of the page
NUM_BINS = 40


class TensorBoardSink(Sink):
    """Writes event files into `folder`.

    Args:
        folder: runs/<name>/tensorboard.
        subject: The run that the pictures show.
        modalities: Modalities of the data, for the charts of the custom scalars page.
        pictures_every: Steps between heat maps and histograms.
        resume_step: Last step to keep.
        evaluation_owed: Whether the evaluation of that step is repeated: an earlier one is removed.
    """

    def __init__(
        self,
        *,
        folder: str | Path,
        subject: Subject,
        modalities: tuple[str, ...],
        pictures_every: int = 100,
        resume_step: int = 0,
        evaluation_owed: bool = False,
    ) -> None:
        self._subject = subject
        self._pictures_every = pictures_every
        self._first_step = resume_step + 1
        self._last_step = resume_step
        self._window = Window()
        drop_events_after(folder, resume_step, evaluation_owed=evaluation_owed)
        self._writer: FileWriter | None = FileWriter(str(folder), flush_secs=FLUSH_SECONDS)
        self._writer.add_summary(summary.custom_scalars(layout(subject, modalities)), self._first_step)

    def step(self, record: Record) -> None:
        self._add(record.scalars, record.step)
        self._last_step = record.step
        self._window.add(record)
        if record.step % self._pictures_every == 0:
            self._add_pictures()

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        self._add(scalars, result.step)

    def text(self, tag: str, markdown: str) -> None:
        # At the attempt's first step: the text differs between attempts, and is removed together with the steps of its
        # attempt.
        self._open.add_summary(summary.text(tag, markdown), self._first_step)

    def flush(self) -> None:
        self._open.flush()

    def close(self) -> None:
        if self._writer is None:
            return
        if self._window:
            self._add_pictures()
        self._writer.close()
        self._writer = None

    @property
    def _open(self) -> FileWriter:
        if self._writer is None:
            raise RuntimeError("TensorBoardSink: used after close()")
        return self._writer

    def _add(self, scalars: Mapping[str, float | None], step: int) -> None:
        known = [summary.scalar(tag, value).value[0] for tag, value in scalars.items() if value is not None]
        self._open.add_summary(Summary(value=known), step)  # one event for each step instead of one for each curve

    def _add_pictures(self) -> None:
        curves = self._window.load_curves()
        if curves is not None:
            self._open.add_summary(summary.image("moe/load_against_target", curves, dataformats="HWC"), self._last_step)
        mixture_of_depths = self._window.depth_map()
        if mixture_of_depths is not None:
            self._open.add_summary(
                summary.image("mixture_of_depths/layers", mixture_of_depths, dataformats="HWC"), self._last_step
            )
        sums, steps = self._window.take()
        for tag, picture in heat_maps(sums, self._subject, steps):
            self._open.add_summary(summary.image(tag, picture, dataformats="HWC"), self._last_step)
        for group, load_Ln in loads(sums["choices_LC"], self._subject.groups):
            known = load_Ln[~np.isnan(load_Ln)]
            if known.size:
                # Fixed bins: numpy's automatic number of bins is unbounded if one load is far from the others.
                bins = np.linspace(0.0, max(4.0, float(known.max())), NUM_BINS + 1)
                histogram = summary.histogram(f"moe/load_histogram/{group.name}", known, bins=bins)
                self._open.add_summary(histogram, self._last_step)


class Window:
    """Sums of the arrays over consecutive steps."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._steps: list[int] = []
        self._load: list[Mapping[str, Mapping[str, float | None]]] = []
        self._depths: DepthStatistics | None = None

    def add(self, record: Record) -> None:
        tokens_LG = record.arrays["tokens_LG"]
        arrays = {
            "choices_LC": record.arrays["choices_LC"],
            "tokens_LG": tokens_LG,
            "dropped_LG": record.arrays["dropped_LG"],
            "entropy_sum_LG": np.where(tokens_LG > 0, record.arrays["entropy_LG"] * tokens_LG, 0.0),
            "weighted_rows_LR": record.arrays["weighted_rows_LR"],
            **{name: record.arrays[name] for name in ("idle_LG",) if name in record.arrays},
        }
        self._sums = {name: self._sums.get(name, 0) + array for name, array in arrays.items()}
        self._steps.append(record.step)
        self._load.append(record.load)
        self._depths = _sum_depths(self._depths, record.mixture_of_depths)

    def load_curves(self) -> np.ndarray | None:
        """Measured true experts per token over the window, with the controller's targets; None without a controller."""
        targets = {name: each["target"] or 0.0 for name, each in self._load[-1].items()} if self._load else {}
        if not targets:
            return None
        values = {name: [_number(load.get(name, {}).get("achieved")) for load in self._load] for name in targets}
        caption = "mean over layers, each step; dashed: the target of the load controller"
        return draw_against_targets(self._steps, values, targets, title="True experts a token", caption=caption)

    def depth_map(self) -> np.ndarray | None:
        """One row for each mixture-of-depths layer; None without any."""
        if self._depths is None:
            return None
        metrics = depth_metrics(self._depths)
        names, columns = ["all tokens", *self._depths.groups], [metrics["computed"], *metrics["computed_by_group"].T]
        for name in ("agreement", "gate_weight"):
            if name in metrics:
                names, columns = [*names, name.replace("_", " ")], [*columns, metrics[name]]
        target = f"{self._depths.capacity:g}"
        caption = f"share of tokens computed, target {target}; agreement and gate weight; {self._words()}"
        scale = linear_scale(caption, 1.0)
        rows = Axis("layer", [str(layer) for layer in self._depths.layers])
        return draw(np.stack(columns, axis=1), rows, Axis("", names), scale=scale, title="Mixture of depths")

    def take(self) -> tuple[dict[str, np.ndarray], str]:
        """Returns the sums and their steps in words, and empties the window."""
        taken = self._sums, self._words()
        self._sums, self._steps, self._load, self._depths = {}, [], [], None
        return taken

    def _words(self) -> str:
        first, last = self._steps[0], self._steps[-1]
        return f"step {first}" if first == last else f"steps {first} to {last}"

    def __bool__(self) -> bool:
        return bool(self._steps)


def _sum_depths(sums: DepthStatistics | None, mixture_of_depths: DepthStatistics | None) -> DepthStatistics | None:
    """Adds the sums of two steps of one run; all other fields are equal."""
    if sums is None or mixture_of_depths is None:
        return mixture_of_depths
    counted = ("tokens_LG", "taken_LG", "agreed_L", "weight_L")
    return replace(sums, **{name: getattr(sums, name) + getattr(mixture_of_depths, name) for name in counted})


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def layout(subject: Subject, modalities: tuple[str, ...]) -> dict[str, dict[str, list[str | list[str]]]]:
    """The custom scalars page: the most important curves, several to a chart."""
    plan = tag_plan(len(subject.groups), len(modalities), mixture_of_depths=subject.mixture_of_depths)
    losses = [f"loss/{name}" for name in modalities] if plan.loss_per_modality else []

    def chart(*tags: str) -> list[str | list[str]]:
        return ["Multiline", list(tags)]

    def by_group(tag: str) -> list[str | list[str]]:
        split = tag.split("/")[1] in plan.by_group
        return chart(*(f"{tag}/{name}" for name in ([group.name for group in subject.groups] if split else ["mean"])))

    mixture_of_depths = {
        "share of the tokens computed": by_group(f"mixture_of_depths/{DEPTH_FAMILY}"),
        "held-out load over its target": chart("mixture_of_depths/load_over_target"),
        "agreement of the causal decision with the choice": chart("mixture_of_depths/agreement"),
        "weight of a computed token": chart("mixture_of_depths/gate_weight"),
    }
    return {
        "Is it learning?": {
            "training loss, nats a token": chart("loss/total", *losses),
            "held-out loss, nats a token": chart("eval/.*"),
            "gradient norm": chart("optim/grad_norm"),
        },
        "Where do the tokens go?": {family.replace("_", " "): by_group(f"moe/{family}") for family in GROUP_FAMILIES}
        | {"dead experts": chart("moe/dead_experts"), "rank imbalance": chart("moe/rank_imbalance")},
        **({"Which tokens pass layers by?": mixture_of_depths} if subject.mixture_of_depths else {}),
        "What does it cost?": {
            "tokens a second": chart("perf/tokens_per_second"),
            "balance efficiency": chart("perf/balance_efficiency", "moe/balance_efficiency_by_count"),
            "bytes sent, and what others would send on top": chart(
                "comm/bytes_sent", "comm/bytes_saved_vs_topk", "comm/bytes_saved_vs_same_active"
            ),
            "seconds a step, and in collectives": chart("perf/step_seconds", "comm/seconds"),
            "rows saved by one row for each rank": chart("comm/dedup_factor"),
            "device memory, MiB": chart("device/memory"),
        },
    }
