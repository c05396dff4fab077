"""Saves a run's state to checkpoints, and resumes the run from them. A checkpoint contains:

parameters, moments, optimizer step count     tensors and state.json, see `moe_dist.checkpoint.state`
values["progress"]                            `Progress`: the step (which sets the schedules), the data position, counters
values["config"], values["data"]              resolved configuration; digests of the data
values["base"]                                only if adapters are trained: path and content hash of the adapters' base
values["controllers"]                         state of each controller, by name
values["levers"]                              state of the levers of `rank_balance`, by name; a checkpoint may lack levers
rank_values["generators"]                     states of each rank's random number generators
placement, versions                           only for human readers; loading a checkpoint ignores both entries
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from pydantic import JsonValue

from moe_dist.checkpoint.base import KEY as BASE
from moe_dist.checkpoint.base import Base
from moe_dist.checkpoint.collective_status import CollectiveStatus
from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.copies import unequal_copies
from moe_dist.checkpoint.directory import find_checkpoint, step_of
from moe_dist.checkpoint.generators import generator_states, restore_generators
from moe_dist.checkpoint.manager import CheckpointManager, Restored
from moe_dist.checkpoint.saver import CheckpointWriter
from moe_dist.checkpoint.state import CheckpointState, RankLayout
from moe_dist.config.load import changes_on_resume, difference
from moe_dist.config.partial import read_stored
from moe_dist.config.schema import Config
from moe_dist.data.order import number_at
from moe_dist.errors import ConfigError, DataError, DivergedError, IntegrityError
from moe_dist.formats.manifest import Manifest
from moe_dist.formats.split_files import data_digest, digest_problems
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.runtime.attempt import Attempt
from moe_dist.runtime.rendezvous import ranks_text
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.status import record_save_seconds
from moe_dist.train.build.training import Training, rank_layout, saved_part
from moe_dist.train.start.base_weights import begin_on_base, folder_base, load_base
from moe_dist.train.start.starting_weights import begin_with_weights, check_scored
from moe_dist.train.step.output_watch import OutputWatch
from moe_dist.train.step.weight_watch import WeightWatch

logger = logging.getLogger(__name__)

MOST_STEPS = 1 << 28  # the number of steps is limited, because a resumed run looks for the record of each step


@dataclass
class Progress:
    """The counters of a run."""

    step: int = 0  # number of steps taken, skipped steps included
    position: int = 0  # number of sequences that all ranks have drawn from the global stream, not counting data.skip
    tokens: int = 0  # number of tokens trained on, without padding
    skipped_steps: int = 0  # number of steps that made no update, because the loss or the gradient was not finite
    skipped_in_a_row: int = 0  # number of consecutive skipped steps up to now
    evaluated: int = 0  # number of steps that had been taken at the last evaluation
    first_position: int = 0  # `position` at the start of the run; above 0 only with run.keep_position

    def owes_evaluation(self, every: int, last: int) -> bool:
        """Returns True if an evaluation is due (every `every` steps and after step `last`) but has not been made yet. A
        stop request can prevent an evaluation; the resumed run then makes it."""
        return self.step > self.evaluated and (self.step % every == 0 or self.step == last)


@runtime_checkable
class Controller(Protocol):
    """An object whose state changes during a run, equally on all ranks, and is not stored in a tensor of the model."""

    def state(self) -> JsonValue:
        """Returns a copy of the state as a JSON value."""
        ...

    def restore(self, state: JsonValue) -> None:
        """Restores a state that `state` returned. Raises DataError if the state is invalid."""
        ...


class Resumable:
    """Saves and restores one rank's part of a run's state. All methods are collective over all ranks.

    Args:
        controllers: Objects whose state is saved with the model, by name; by default the controllers of `training`.
        levers: The run's levers by name. The state of each lever is saved; it is restored if the checkpoint has it.
        report_save: Function that rank 0 calls after each save with its duration in seconds.

    Attributes:
        placement: The current placement of the experts.
        writer: Writes the checkpoints, and logs or raises the errors of the writing thread.
    """

    def __init__(
        self,
        training: Training,
        placement: ExpertPlacement,
        checkpoints: CheckpointManager,
        config: Config,
        manifest: Manifest,
        *,
        controllers: Mapping[str, Controller] | None = None,
        levers: Mapping[str, object] | None = None,
        report_save: Callable[[float], None] = lambda _: None,
    ) -> None:
        mesh = training.parallel.mesh
        self._training, self._checkpoints, self._config, self._manifest = training, checkpoints, config, manifest
        self._controllers = training.controllers() if controllers is None else controllers
        self.writer = CheckpointWriter(
            checkpoints, asynchronous=config.checkpoint.asynchronous, tracker=mesh.tracker, report=report_save
        )
        self._device = mesh.device
        self._data: dict[str, str] = {}
        self._base: Base | None = None
        self.placement, self._mesh = placement, mesh
        self._levers = {name: each for name, each in (levers or {}).items() if isinstance(each, Controller)}

    def save(self, progress: Progress, *, durable: bool) -> None:
        """Saves the state of the run, as `CheckpointWriter.write` does.

        Raises:
            CheckpointError: raised on all ranks if a durable save failed. The previous checkpoint is still valid.
            DivergedError: raised on all ranks, before anything is written, if the state contains nan or inf.
        """
        values: dict[str, JsonValue] = {
            "progress": {**asdict(progress)},
            "config": self._config.model_dump(mode="json"),
            "data": {**self._data},
            "controllers": {name: controller.state() for name, controller in self._controllers.items()},
            "levers": {name: lever.state() for name, lever in self._levers.items()},
            **({} if self._base is None else {BASE: {**asdict(self._base)}}),
        }
        rank_values: dict[str, JsonValue] = {"generators": generator_states(self._device)}
        try:
            self.writer.write(progress.step, self._capture(values, rank_values), durable=durable)
        except DivergedError as error:
            told = DivergedError(f"step {progress.step} is not saved, because {error}; {self.ways_on(progress)}")
            told.consequence = error.consequence
            raise told from error

    def compare_copies(self, progress: Progress) -> None:
        """Compares weights, moments and buffers that several ranks hold (`unequal_copies`).

        Raises:
            IntegrityError: copies differ. Raised on all ranks. Ranks whose copies agree with the majority mark the error as
                a consequence of another rank's error.
        """
        mesh = self._mesh
        if mesh.world_size == 1 or not self._training.has_copies:
            return
        names, ranks = unequal_copies(self._training.capture(self._layout), mesh.world, mesh.device, mesh.tracker)
        if not names:
            return
        more = f" and {len(names) - 1} more tensors" if names[1:] else ""
        saved = "no checkpoint was saved, so the same command begins at step 1"
        if self.newest is not None:
            saved = f"the copies were equal when {self.newest} was saved, and the same command resumes from it"
        error = IntegrityError(
            f"after step {progress.step} the copies of {names[0]}{more} differ on "
            f"{ranks_text(ranks)}, though all ranks compute the same update; {saved}; if it happens again, test the "
            f"hardware of {'this rank' if len(ranks) == 1 else 'these ranks'} (docs/reliability.md)"
        )
        error.consequence = mesh.rank not in ranks
        raise error

    def weight_watch(self) -> WeightWatch | None:
        """Returns an object that measures the run's weights; None if the optimizer shards them."""
        training = self._training
        if not training.has_copies:
            return None
        numbers = self._config.model.moe_layers
        modules = {getattr(each, "name", ""): each for each in training.parallel.model.moe_modules()}
        outputs = OutputWatch(
            [(at, modules[name]) for at, number in enumerate(numbers) if (name := f"layers.{number}") in modules],
            (len(numbers), self.placement.num_experts),
            lambda: self.placement.slots[self._mesh.ep_rank % self.placement.num_ranks],
            self._mesh.device,
        )
        read = partial(training.trained_tensors, self._layout)
        return WeightWatch(lambda gradients: read(gradients=gradients), self._mesh, outputs)

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that this attempt has loaded or committed. Call `writer.wait` before reading it."""
        return self._checkpoints.newest

    def ways_on(self, progress: Progress) -> str:
        """Returns the end of a diverged run's message: where the same command resumes, and which settings to change."""
        config, newest, first = self._config, self.newest, progress.step - progress.skipped_in_a_row + 1
        saved = 0 if newest is None else step_of(newest) or 0
        place = "no checkpoint was saved, so that the same command begins at step 1"
        if newest is not None:
            before = f" and from before the first skipped step {first}" if saved < first <= progress.step else ""
            place = f"the newest checkpoint {newest} is finite{before}; the same command resumes from it"
        # The step before the first skipped step may have caused the failure by its update, so it is left out, too.
        since = min(max(saved, first - 2), progress.step - 1)
        begin = progress.position - (progress.step - since) * config.train.global_batch
        left = [number_at(at, config.data.skip) for at in (begin, progress.position - 1)]
        skip = sorted([*(list(pair) for pair in config.data.skip if not left[0] < pair[0] < left[1]), left])
        data = f"data.skip='{skip}' leaves out the sequences of steps {since + 1} to {progress.step}, "
        clip = config.optimizer.clip_norm
        clips = "set optimizer.clip_norm" if clip is None else f"lower optimizer.clip_norm={clip:g}"
        back = "" if newest is None else f", or name an older checkpoint in {newest.parent}/latest"
        return (
            f"{place}, and without a change it will probably diverge again: {'' if config.router_tuning else data}lower "
            f"optimizer.lr={config.optimizer.lr:g}, {clips}, lengthen the warm-up in optimizer.schedule{back} "
            "(docs/monitoring.md)"
        )

    def restore(self) -> Progress:
        """Loads the newest checkpoint into model and optimizer, and returns the run's progress. If there is no checkpoint,
        loads the weights of `run.init_from`, if it is set, and returns the progress of a new run.

        Raises:
            DataError: the checkpoint is damaged or belongs to another run, or the run's data have changed.
            ConfigError: the checkpoint's model differs from the configured model.
        """
        found = self.status.first("look at the data", lambda: data_digest(self._config.data.path, self._manifest))
        self._data = found or {}  # `found` is None except on rank 0, because only rank 0 compares data digests
        self._checkpoints.clear()  # before `latest`, because a suspended process could still commit an unfinished save
        newest = self._checkpoints.latest()
        if newest is None:
            self.status.first("look at the weights to be tuned", lambda: check_scored(self._config))
            if (report := self.status.phase("read model.folder", self._training.begin)) and self._checkpoints.rank == 0:
                print(report)
            if self._config.model.adapts_folder:
                self._base = self.status.phase("look at model.folder", lambda: folder_base(self._config))
            if self._config.run.init_from is not None:
                report = self._begin()
                if self._checkpoints.rank == 0:
                    print(f"run.init_from: {report}")
                if self._config.run.keep_position:
                    return self._at_kept_position(Path(self._config.run.init_from))
            return Progress()
        state = self._capture()  # this creates the optimizer's moments
        restored = self._checkpoints.load(newest, state)
        self._training.loaded(state)
        self.status.first("go on", lambda: self._check_origin(newest, restored))
        self._checkpoints.check_finite(newest, state)
        progress = progress_of(restored, self._config, newest)
        model = self._training.parallel.model
        if saved_part(self._config) == "trained":
            self._base = load_base(self._config, restored.values, newest, self._checkpoints, model, self._layout)
        self._restore_controllers(restored, newest)
        states = mapping_of({"levers": {}, **restored.values}, "levers", newest)
        for name, lever in self._levers.items():
            if (state := states.get(name)) is not None:
                lever.restore(state)
        self.placement = self._training.step.placement  # a lever may have restored moved experts
        if restored.rank_values:
            restore_generators(mapping_of(restored.rank_values, "generators", newest), self._device)
        logger.info("going on from %s", newest)
        return progress

    @property
    def status(self) -> CollectiveStatus:
        """Runs phases that fail either on all ranks or on none."""
        return self._checkpoints.status

    @property
    def _layout(self) -> RankLayout:
        return rank_layout(self.placement, self._mesh)

    def _begin(self) -> str:
        """Loads the weights of `run.init_from`; returns a report to print."""
        model = self._training.parallel.model
        if saved_part(self._config) == "trained":
            self._base, report = begin_on_base(self._config, self._checkpoints, model, self._layout)
            return report
        state = self._capture()
        report = begin_with_weights(self._config, self._checkpoints, state, model)
        self._training.loaded(state)
        return report

    def _capture(
        self, values: Mapping[str, JsonValue] | None = None, rank_values: Mapping[str, JsonValue] | None = None
    ) -> CheckpointState:
        part = saved_part(self._config)
        return self._training.capture(self._layout, part=part, values=values, rank_values=rank_values)

    def _check_origin(self, folder: Path, restored: Restored) -> None:
        """Checks that this run saved the checkpoint and that the run's data have not changed since. Runs on rank 0."""
        saved = saved_config(restored.values, folder)
        if changes := [each for each in changes_on_resume(saved, self._config) if each.key != "run.name"]:
            raise DataError(
                [
                    f"{folder}: another run saved this checkpoint; put this run's own back, or start a new run with "
                    f"run.init_from={folder} to go on from its weights",
                    *(f"{key}: {old!r} in the checkpoint, {new!r} now" for key, old, new in changes),
                ],
                see="docs/checkpoints.md",
            )
        check_skip(progress_of(restored, saved, folder), saved, self._config, folder)
        if problems := digest_problems(mapping_of(restored.values, "data", folder), self._data):
            raise DataError(
                [
                    f"data.path={self._config.data.path!r}: these are not the data that {folder} was trained on; put those "
                    "back, or start a new run with run.init_from to go on with other data",
                    *problems,
                ],
                see="docs/checkpoints.md",
            )

    def _at_kept_position(self, init_from: Path) -> Progress:
        """Returns the progress of a new run that continues the data of the run `init_from` where that run ended. Raises
        ConfigError if the two runs do not draw the same stream of sequences."""
        position = self.status.broadcast(
            "keep the position", lambda: kept_position(find_checkpoint(init_from), self._config, self._data)
        )
        if self._checkpoints.rank == 0:
            print(f"run.keep_position: the data go on at sequence {position:,}")
        return Progress(position=position, first_position=position)

    def _restore_controllers(self, restored: Restored, folder: Path) -> None:
        saved = mapping_of(restored.values, "controllers", folder)
        if saved.keys() != self._controllers.keys():
            raise DataError(f"{folder} has states of {sorted(saved)}, the run needs those of {sorted(self._controllers)}")
        for name, controller in self._controllers.items():
            controller.restore(saved[name])


def build_resumable(
    training: Training,
    folder: RunFolder,
    attempt: Attempt,
    config: Config,
    manifest: Manifest,
    placement: ExpertPlacement,
    levers: Mapping[str, object],
) -> Resumable:
    """Makes the `Resumable` of a run, with the manager of the run's checkpoints."""
    mesh = training.parallel.mesh
    checkpoints = CheckpointManager(
        folder.checkpoints,
        keep=config.checkpoint.keep,
        lease_check=attempt.check_commit,
        process_group=mesh.checkpoint,
        tracker=mesh.tracker,
    )
    report_save = partial(record_save_seconds, folder.logs)
    return Resumable(training, placement, checkpoints, config, manifest, levers=levers, report_save=report_save)


def progress_of(restored: Restored, config: Config, folder: Path) -> Progress:
    """Returns the progress that a checkpoint contains. Raises DataError if a counter is invalid, or if it contradicts
    another counter or the configuration."""
    saved, names = mapping_of(restored.values, "progress", folder), [field.name for field in fields(Progress)]
    saved = {"first_position": 0, **saved}  # earlier versions did not save first_position, which was 0
    numbers = {name: value for name, value in saved.items() if type(value) is int and 0 <= value < 1 << 62}
    if sorted(saved) != sorted(names) or numbers.keys() != saved.keys():
        raise DataError(
            f"{folder}: the counters in its state.json must be whole numbers {', '.join(names)}, not {saved!r:.400}"
        )
    progress = Progress(**numbers)
    batch, first = config.train.global_batch, progress.first_position
    rules = {
        f"step={progress.step} is the step {restored.step} of the checkpoint": progress.step == restored.step,
        f"position={progress.position} is step x train.global_batch={batch} behind first_position={first}": (
            progress.position - first == progress.step * batch
        ),
        f"tokens={progress.tokens} are at most those of the positions since, x data.seq_len": progress.tokens
        <= (progress.position - first) * config.data.seq_len,
        f"skipped_in_a_row={progress.skipped_in_a_row} <= skipped_steps={progress.skipped_steps} <= step": (
            progress.skipped_in_a_row <= progress.skipped_steps <= progress.step
        ),
        f"evaluated={progress.evaluated} <= step": progress.evaluated <= progress.step,
        f"step={progress.step} < {MOST_STEPS}": progress.step < MOST_STEPS,
        f"optimizer_steps={restored.optimizer_steps} is step - skipped_steps={progress.skipped_steps}": (
            restored.optimizer_steps in (None, progress.step - progress.skipped_steps)
        ),
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise DataError([f"{folder}: its counters contradict each other; it should hold that {rule}" for rule in broken])
    return progress


def check_skip(progress: Progress, saved: Config, config: Config, folder: Path) -> None:
    """Raises ConfigError if `data.skip` has changed for sequences that the run has already drawn. After such a change, the
    checkpoint's position would mean another sequence."""
    drawn = number_at(progress.position - 1, saved.data.skip) if progress.position else -1
    past, now = (
        [(first, min(last, drawn)) for first, last in each.data.skip if first <= drawn] for each in (saved, config)
    )
    if past != now:
        raise ConfigError(
            f"data.skip={json.dumps(config.data.skip)}: {folder} has drawn the sequences up to {drawn} with "
            f"data.skip={json.dumps(saved.data.skip)}; change only pairs of later sequences, or go back to an older "
            "checkpoint (docs/checkpoints.md)"
        )


def kept_position(folder: Path, config: Config, data: Mapping[str, str]) -> int:
    """Returns the `position` of another run's checkpoint. A new run continues the stream of sequences at this position.

    The data set, the section `data` and the seed must be equal in both runs, because together they determine the stream.

    Raises:
        ConfigError: the data set, the section `data` or the seed differs, or the other run tuned routers.
        DataError: the checkpoint lacks the values of a run, for example because an import wrote the checkpoint.
    """
    state = open_checkpoint(folder).state
    saved = saved_config(state.values, folder)
    problems = [
        f"run.keep_position=true: {key} is {old!r} in {folder} and {new!r} here, so that its position is of another "
        f"stream; set it to {old!r}, or run.keep_position=false"
        for key, old, new in difference(saved, config)
        if key == "run.seed" or (key.startswith("data.") and key != "data.path")
    ]
    problems += [
        f"run.keep_position=true: {problem}; take the data of {folder}, or run.keep_position=false"
        for problem in digest_problems(mapping_of(state.values, "data", folder), data)
    ]
    if saved.router_tuning is not None:
        problems.append(
            f"run.keep_position=true: {folder} stands among samples of router tuning; set run.keep_position=false"
        )
    if problems:
        raise ConfigError(problems, see="docs/checkpoints.md")
    return progress_of(Restored(state.step, state.values, {}, state.optimizer_steps), saved, folder).position


def saved_config(values: Mapping[str, JsonValue], folder: Path) -> Config:
    """Returns the configuration of the run that saved a checkpoint. Raises DataError if this version cannot read the
    configuration."""
    try:
        return read_stored(Config, mapping_of(values, "config", folder))
    except ConfigError as error:
        raise DataError(
            f"{folder}: the configuration in its state.json cannot be read by this version of moe_dist; go on with the "
            f"version in provenance.json: {'; '.join(error.problems)}"
        ) from error


def mapping_of(values: Mapping[str, JsonValue], name: str, folder: Path) -> dict[str, JsonValue]:
    """Returns `values[name]` of a checkpoint. Raises DataError if this value is missing or is not a mapping."""
    found = values.get(name)
    if not isinstance(found, dict):
        raise DataError(f"{folder}: it holds no {name!r} of a run, but {found!r:.80}")
    return found
