"""Reads what a report draws: counts over steps from a run's records or a trace, and single tokens from a trace.

Shape letters are as in `metrics.py`; in addition F frames (sums over consecutive steps), T tokens, K choices of a token.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from moe_dist.errors import DataError
from moe_dist.monitor.heatmaps import Axis
from moe_dist.monitor.metrics import NEEDED
from moe_dist.monitor.report.drawing import MOST_FRAMES
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.monitor.trace.foreign import NO_ID, ForeignTrace
from moe_dist.monitor.trace.format import MANIFEST
from moe_dist.monitor.trace.reader import Trace, TracedStep
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

SLOWEST = ("slowest_rank", "slowest_rank_seconds", "other_ranks_seconds")  # keys of `Record.host`
FRAMES = 60  # largest number of points in a curve over steps
WINDOW = 50  # the first lines of a report summarise this many last recorded steps
MATRIX_CELLS = 500_000  # largest number of cells of all co-activation matrices together, about 2 MB
MOST_TOKENS = 50_000  # largest number of tokens that a report reads from a trace, from the last step backwards


class Frame(NamedTuple):
    """Routing counts summed over consecutive steps, int64, as in `Record.arrays`. `needed_G`, float64, is the largest
    `StepResult.busiest_G` of these steps; it is 0 if the records or the trace lack it. `ledger` has the sums of
    `Record.ledger`; it is empty for a trace, and for a model whose rows moe_dist does not send."""

    first: int
    last: int
    choices_LC: np.ndarray
    tokens_LG: np.ndarray
    dropped_LG: np.ndarray
    needed_G: np.ndarray
    ledger: Mapping[str, int] = MappingProxyType({})

    @property
    def label(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first} to {self.last}"

    @property
    def words(self) -> str:
        return f"step{'' if self.first == self.last else 's'} {self.label}"


@dataclass
class History:
    """What the records of a run tell beside its routing.

    Attributes:
        steps, skipped: Numbers of recorded and of skipped steps.
        first_losses, last_losses, speeds: Finite losses and tokens per second of the first or last WINDOW steps.
        held_out: Step and losses of the last evaluation.
        slowest: Rank, its seconds and the other ranks' seconds in the last step.
        memory: Largest MiB of any rank, and whether it is that of a GPU.
        damaged: Lines and steps that cannot be read.
    """

    steps: int = 0
    skipped: int = 0
    first_losses: list[float] = field(default_factory=list)
    last_losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    speeds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    held_out: tuple[int, str] | None = None
    slowest: tuple[float, float, float] | None = None
    memory: tuple[float, bool] | None = None
    epochs: dict[str, float] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds a line of metrics.jsonl. Raises TypeError, ValueError or AttributeError if it is damaged."""
        scalars, host = dict(line.get("scalars") or {}), dict(line.get("host") or {})
        if line.get("kind") == "evaluation":
            losses = dict(line.get("losses") or {})
            self.held_out = int(line["step"]), ", ".join(f"{name} {float(loss):.3f}" for name, loss in losses.items())
        if line.get("kind") != "step":
            return
        loss, speed = scalars.get("loss/total"), scalars.get("perf/tokens_per_second")
        if loss is not None:
            self.last_losses.append(float(loss))
            self.first_losses += [float(loss)] if len(self.first_losses) < WINDOW else []
        if speed is not None:
            self.speeds.append(float(speed))
        if (mib := scalars.get("device/memory")) is not None:
            self.memory = float(mib), host.get("gpu_used_mib") is not None
        if host.get("slowest_rank") is not None:
            rank, seconds, others = (host[name] for name in SLOWEST)
            self.slowest = float(rank), float(seconds), float(others)
        self.epochs = {name: float(value) for name, value in dict(line.get("epochs") or {}).items()}
        self.steps, self.skipped = self.steps + 1, self.skipped + bool(line.get("skipped"))


@dataclass(frozen=True)
class Tokens:
    """Single tokens from a trace.

    Attributes:
        token_T, modality_T, sequence_T, position_T: For each token: its id, the index of its modality, the number of its
            sequence, and its position in the sequence.
        ids_TLK: Chosen columns. -2 - c is a choice of column c that a capacity dropped, -1 is no choice.
        steps: Numbers of the steps to which the tokens belong. `of` is the number of all traced steps.
        split: `training` or `held-out`.
        name_of: Returns the text of a token, or None if it is unknown.
        picture_of: Returns the pixels of a picture token, uint8 [height, width, 3]; None for other tokens.
        loss_T: Loss in nats of the prediction at each token, nan without a label. None if the trace has no losses.
        grid: Numbers of rows and columns of a picture's cells; (0, 0) if the data have no pictures.
    """

    token_T: np.ndarray
    modality_T: np.ndarray
    sequence_T: np.ndarray
    position_T: np.ndarray
    ids_TLK: np.ndarray
    steps: tuple[int, ...]
    of: int
    split: str
    name_of: Callable[[int], str | None] = lambda _: None
    picture_of: Callable[[int], np.ndarray | None] = lambda _: None
    loss_T: np.ndarray | None = None
    grid: tuple[int, int] = (0, 0)

    @property
    def named(self) -> bool:
        """Returns whether the trace has token ids. Traces of other systems have none."""
        return bool((self.token_T != NO_ID).any())


@dataclass(frozen=True)
class Routing:
    """The routing of one run or trace.

    Attributes:
        frames: At most `FRAMES` frames, in the order of their steps.
        window: Sums over the last `WINDOW` recorded steps. `window_steps` is the actual number of these steps.
        balance_coefficient: Coefficient of the balance loss in the last step; nan if it is unknown.
        split: Split to which the counted tokens belong: `training`, or the split of the trace.
        hints: Step, kind and text of the last warning of each kind.
        history: Numbers of the run's other records; None for a trace without records.
        ended: How the run ended or where it stands, a sentence; empty for a run that is done.
    """

    name: str
    source: str
    placement: ExpertPlacement
    layers: tuple[int, ...]
    modalities: tuple[str, ...]
    frames: tuple[Frame, ...]
    window: Frame
    window_steps: int
    configuration: Mapping[str, Any]
    balance_coefficient: float
    tokens: Tokens | None
    split: str = "training"
    hints: tuple[tuple[int, str, str], ...] = ()
    history: History | None = None
    ended: str = ""

    @property
    def groups(self) -> tuple[ExpertGroup, ...]:
        return self.placement.groups

    @property
    def layer_axis(self) -> Axis:
        return Axis("layer", [str(layer) for layer in self.layers])

    @property
    def group_axis(self) -> Axis:
        return Axis("group", [group.name for group in self.groups])


@dataclass(frozen=True)
class Layout:
    """A placement of the experts on the ranks of an EP group, shown in the report's table of bytes."""

    policy: str
    placement: ExpertPlacement


@dataclass(frozen=True)
class Subject:
    """The input of a report: a routing, another routing to compare with, the layouts and node sizes for the table of bytes,
    the largest number of slider positions, and the largest number of cells of all co-activation matrices together."""

    routing: Routing
    against: Routing | None
    layouts: Sequence[Layout]
    node_sizes: tuple[int, ...]
    slides: int = MOST_FRAMES
    matrix_cells: int = MATRIX_CELLS


def merged(frames: Sequence[Frame], most: int) -> tuple[Frame, ...]:
    """Sums consecutive frames, so that at most `most` frames remain. All sums have equally many frames, except the last
    sum, which also has the frames left over."""
    size = math.ceil(len(frames) / most)
    starts = range(0, len(frames) - size + 1, size)
    return tuple(total(frames[at : at + size] if at < starts[-1] else frames[at:]) for at in starts)


def total(frames: Sequence[Frame]) -> Frame:
    """Returns one frame: the sum of consecutive frames."""
    choices, tokens, dropped, needed = ([getattr(frame, name) for frame in frames] for name in Frame._fields[2:6])
    sums = np.sum(choices, 0), np.sum(tokens, 0), np.sum(dropped, 0)
    ledger = {key: sum(frame.ledger.get(key, 0) for frame in frames) for key in frames[-1].ledger}
    return Frame(frames[0].first, frames[-1].last, *sums, needed_G=np.max(needed, 0), ledger=ledger)


def frames_of_records(
    path: Path, shape: tuple[int, int, int], names: Sequence[str] = ()
) -> tuple[list[Frame], list[Frame], float, History]:
    """Reads metrics.jsonl. Damaged lines are left out and named. Raises DataError if a line has arrays of another model, or
    if no line has arrays.

    Args:
        shape: Three numbers of the model: MoE layers, columns and groups (L, C, G).
        names: Names of the groups, for reading `Frame.needed_G`.

    Returns:
        At most 2 x FRAMES frames of all steps, one frame for each of the last WINDOW steps, the last coefficient of the
        balance loss, and the history. The frames of all steps sum equally many records; only the last may sum up to
        twice as many.
    """
    frames: list[Frame] = []
    window: deque[Frame] = deque(maxlen=WINDOW)
    history = History()
    width, inside, coefficient = 1, 1, float("nan")  # width: number of records in a full frame; inside: in the last frame
    for frame, coefficient in _recorded(path, shape, names, history):  # noqa: B007  # the last coefficient is returned
        window.append(frame)
        if inside < width:
            frames[-1], inside = total([frames[-1], frame]), inside + 1
        else:
            frames, inside = [*frames, frame], 1
        if len(frames) > 2 * FRAMES:  # joins pairs of frames while reading, because all arrays may not fit into memory
            frames, width = [total(frames[i : i + 2]) for i in range(0, len(frames), 2)], 2 * width
    if not frames:
        raise DataError(f"{path}: no line has the arrays of a step; train the run at least one step, or give another run")
    if inside < width:
        frames[-2:] = [total(frames[-2:])]
    return frames, list(window), coefficient, history


def _recorded(
    path: Path, shape: tuple[int, int, int], names: Sequence[str], history: History
) -> Iterator[tuple[Frame, float]]:
    num_layers, columns, groups = shape
    shapes = {"choices_LC": (num_layers, columns), "tokens_LG": (num_layers, groups), "dropped_LG": (num_layers, groups)}
    for line in read_lines(path, history.damaged):
        try:
            history.add(line)
            if line.get("kind") != "step" or "arrays" not in line:
                continue
            arrays = {name: np.array(line["arrays"][name], np.int64) for name in shapes}
            coefficient = line["balance_coefficient"]  # null if another trainer wrote the file
            coefficient = float("nan" if coefficient is None else coefficient)
            needed = [line.get("host", {}).get(NEEDED + name, 0.0) for name in names] or [0.0] * groups
            needed_G = np.array(needed, np.float64)
            ledger = {key: int(np.int64(value)) for key, value in dict(line.get("ledger") or {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            history.damaged.append(f"the record of step {line['step']}")
            continue
        for name, array in arrays.items():
            if array.shape != shapes[name]:
                raise DataError(
                    f"{path}, step {line['step']}: arrays.{name} is {array.shape}, but the model has {shapes[name]} by "
                    f"config.yaml or {MANIFEST}; put back the files of one run"
                )
        yield Frame(line["step"], line["step"], **arrays, needed_G=needed_G, ledger=ledger), coefficient


def frames_of_trace(
    trace: Trace | ForeignTrace, groups: Sequence[ExpertGroup], layers: int
) -> tuple[list[Frame], list[Frame]]:
    """Returns frames of one step each: at most FRAMES evenly spaced steps of a trace, and the trace's last WINDOW steps."""
    last = len(trace.steps) - 1
    spaced = np.unique(np.linspace(0, last, FRAMES).astype(int)).tolist()
    window = range(max(0, last + 1 - WINDOW), last + 1)
    frames = {}
    for place in {*spaced, *window}:
        number = trace.steps[place]
        step = trace.step(number)
        group_T = group_of_modality(groups, step.manifest.modalities)[step.tokens["modality"]]
        tokens_G = np.bincount(group_T, minlength=len(groups))
        dropped_LC = step.dropped()
        dropped_LG = np.stack([dropped_LC[:, group.experts].sum(1) for group in groups], axis=1)
        unknown = np.zeros(len(groups))  # a trace does not tell a rank's micro-batches
        frames[place] = Frame(number, number, step.choices(), np.tile(tokens_G, (layers, 1)), dropped_LG, unknown)
    return [frames[place] for place in spaced], [frames[place] for place in window]


def model_shape(groups: Sequence[ExpertGroup], layers: Sequence[int]) -> str:
    """Returns a text for error messages that tells a model's layers and groups."""
    each = (f"{g.name} {g.num_experts} + {g.num_columns - g.num_experts}, top {g.top_k}, width {g.ffn_dim}" for g in groups)
    return f"{len(layers)} MoE layers of {', '.join(each)}"


def group_of_modality(groups: Sequence[ExpertGroup], modalities: Sequence[str]) -> np.ndarray:
    """Returns, for each modality, the index of its expert group, int64 [M]. Raises DataError if a modality has no group."""
    found = [[g for g, group in enumerate(groups) if name in group.modalities] for name in modalities]
    if lost := [name for name, owners in zip(modalities, found, strict=True) if not owners]:
        raise DataError(f"modalities={list(modalities)}: {lost} in no group's modalities; take the manifest of this trace")
    return np.array([owners[0] for owners in found], np.int64)


def last_tokens(trace: Trace | ForeignTrace, **names: Any) -> Tokens:
    """Reads the tokens of a trace's last steps, but at most MOST_TOKENS tokens. `names` are values for the fields
    `name_of`, `picture_of` and `grid` of `Tokens`."""
    steps: list[TracedStep] = []
    for number in reversed(trace.steps):
        if steps and sum(len(step.tokens) for step in steps) + len(steps[-1].tokens) > MOST_TOKENS:
            break
        steps.insert(0, trace.step(number))
        if steps[0].ids.shape[1:] != steps[-1].ids.shape[1:]:
            steps.pop(0)
            break
    tokens = np.concatenate([step.tokens for step in steps])[-MOST_TOKENS:]
    ids = np.concatenate([step.ids for step in steps])[-MOST_TOKENS:]
    losses = [step.losses for step in steps if step.losses is not None]
    manifest = steps[-1].manifest
    return Tokens(
        tokens["token"],
        tokens["modality"],
        tokens["sequence"],
        tokens["position"],
        ids,
        trace.steps[-len(steps) :],
        len(trace.steps),
        manifest.split,
        loss_T=np.concatenate(losses)[-MOST_TOKENS:] if len(losses) == len(steps) else None,
        **names,
    )
