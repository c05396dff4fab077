"""Measures a finished run on one process: python -m research.experiments.measure STUDY.yaml RUN PROBES BEFORE [--asks ...]

Writes measured.json into the run's folder. It contains held-out and training losses, the number of true (not null) experts
per token, the number of rows that an EP group would send, the curve of loss over FLOPs and seconds, and the results of the
probes that the study's arm requests. Then removes all checkpoints but the last: only the curve needs earlier checkpoints.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.directory import CheckpointDirectory
from moe_dist.data.batch import Batch
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.loader import source_shares
from moe_dist.formats.manifest import load_manifest
from moe_dist.inference.loaded_run import CheckpointReader
from moe_dist.inference.questions.split import Side
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routers.selection import choice_of_training
from moe_dist.monitor.metrics import group_metrics
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.train.build.training import LoopSettings, build_loader, group_of_modality, loop_settings
from moe_dist.train.evaluation.evaluator import by_threshold, calibrate
from moe_dist.train.loop.trainer import Loader
from moe_dist.train.objective.loss import forward
from research.experiments import probes
from research.experiments.disturbance import FOLDER, disturb
from research.experiments.domain_probe import domains
from research.experiments.held_loads import hold_loads
from research.experiments.heldout import heldout_sequences
from research.experiments.questions import QuestionRound, make_samples
from research.experiments.runner import MEASURED
from research.experiments.study import CurveSection, MeasureSection, QuestionsSection, load_study
from research.experiments.tokens import (
    ROWS,
    SentRows,
    accuracy,
    answers,
    binned,
    evaluate,
    loads,
    losses,
    rank_of_tokens,
    recorded_routers,
    spread,
    tables_of,
)
from research.experiments.training_loss import training_between

TABLE_STEPS = 50  # number of training steps whose tokens are counted in tables of loads


@dataclass(frozen=True)
class Spent:
    """The cost of training up to a step."""

    tokens: int = 0  # number of tokens without padding
    flops: float = 0.0  # forward and backward FLOPs, by moe_dist.plan.flops from the measured true experts per token
    seconds: float = 0.0  # seconds of training steps, without evaluations, checkpoints and starts
    bytes: float = 0.0  # number of bytes that all ranks sent to other ranks, by the ledger


def spent_by_step(metrics: Path, plan: LoopSettings, before: Spent) -> dict[int, Spent]:
    """Maps each step to the cost of training up to the end of this step. All costs include the cost `before` the run."""
    spent, sums, groups = {}, before, plan.placement.groups
    for record in read_lines(metrics):
        if record["kind"] != "step":
            continue
        scalars, names = record["scalars"], ("choices_LC", "tokens_LG", "dropped_LG")
        # Computed from counts, because with many modalities the scalars have only the mean over groups.
        choices, of_group, dropped = (np.array(record["arrays"][name]).sum(0, keepdims=True) for name in names)
        taken_G = group_metrics(choices, of_group, groups, dropped_LG=dropped)["experts_per_token"][0]
        tokens_G = of_group[0].tolist()
        experts = {group.name: value for group, value in zip(groups, np.nan_to_num(taken_G).tolist(), strict=True)}
        share = {name: each / max(1.0, sum(tokens_G)) for name, each in zip(experts, tokens_G, strict=True)}
        tokens = before.tokens + int(scalars["optim/tokens"]) - sums.tokens
        flops = sums.flops + tokens * plan.flops_per_token(experts, share)
        sent = record["ledger"]["payload_bytes"] + record["ledger"]["metadata_bytes"]
        seconds = sums.seconds + scalars["perf/step_seconds"]
        sums = Spent(sums.tokens + tokens, flops, seconds, sums.bytes + sent)
        spent[record["step"]] = sums
    return spent


class Measurement:
    """Measures one run.

    Args:
        folder: Folder of the run.
        section: The study's section that lists the measurements.
        before: Cost of training before the run. The costs in the record include this cost.
        side: Side (validation or test) of held-out sequences and of multiple-choice questions. A pilot uses validation.
    """

    def __init__(self, folder: Path, section: MeasureSection, before: Spent, *, side: Side = Side.TEST) -> None:
        self._folder, self._section, self._side = RunFolder(folder), section, side
        self._config = self._folder.read_config()
        self._manifest = load_manifest(self._config.data.path)
        checkpoints = folder / "checkpoints"
        self._directory = CheckpointDirectory(checkpoints)
        self._reader = CheckpointReader(checkpoints, self._config, torch.device("cpu"))  # one rank holds all experts
        self._model, self._placement = self._reader.model, self._reader.placement
        self._before = before
        self._groups = torch.tensor(group_of_modality(self._manifest, self._placement))
        modalities = tuple(self._manifest.modalities)
        self._image = modalities.index("image") if "image" in modalities else -1

    def record(self, wanted: Sequence[str], asks: Sequence[str] = ()) -> dict[str, Any]:
        """Returns the record with all measurements of the run. `wanted` names the probes. `asks` may name the further
        measurements `oracle`, `samples`, `disturbed` and `load_tables`."""
        last = max(self._directory.steps())
        plan = loop_settings(self._config, self._manifest, self._placement)
        spent = spent_by_step(self._folder.metrics_jsonl, plan, self._before)
        section, by_source = self._section, self._batches_by_source(self._section.sequences)
        batches = [batch for of_source in by_source.values() for batch in of_source]
        training = training_between(self._folder.metrics_jsonl, self._planned())
        curve = [] if section.curve is None else self._curve(section.curve, spent, training)
        tokens = evaluate(model := self._model_at(last), batches, self._groups, image=self._image)
        found = {
            "steps": last,
            **asdict(spent[last]),
            "loss": losses(tokens),
            "training": training.get(last, {}),
            "tokens_scored": len(tokens.loss_N),
            "load": loads(tokens),
            "load_by_loss": binned(tokens, tokens.loss_N),
            "load_by_frequency": binned(tokens, self._frequency()[tokens.input_N]),
            "wire": {"ep": section.wire.ep, **self._wire(batches)},
            "curve": curve,
            "probes": {name: getattr(self, f"_probe_{name}")(batches) for name in wanted},
        }
        if section.accuracy:
            found["accuracy"] = accuracy(model, batches, self._groups, image=self._image)
        asked = {name: each for name, each in by_source.items() if self._manifest.sources[name].train.prompt is not None}
        if asked:
            found["answers"] = answers(model, asked, self._groups)
        if "domains" in asks:
            found["domains"] = domains(model, by_source, self._groups)
        if "load_tables" in asks:
            found["load_tables"] = self._load_tables(model)
        if section.questions is not None:
            found |= self._asked(section.questions, asks)
        self._directory.remove_beyond(1, last)
        return found

    def _asked(self, section: QuestionsSection, asks: Sequence[str]) -> dict[str, Any]:
        question_round = QuestionRound(self._model, self._config, self._manifest, self._groups, section, self._side)
        found: dict[str, Any] = {"questions": question_round.record()}
        if "oracle" in asks:
            found["oracle"] = question_round.oracle()
        if "samples" in asks:
            found["samples"] = make_samples(self._folder.path, section)
        if "disturbed" in asks:
            found["disturbed"] = self._disturbed(section)
        return found

    def _disturbed(self, section: QuestionsSection) -> dict[str, Any]:
        """Disturbs the model's routers. Returns the disturbed model's results of questions, oracle and samples."""
        of_model = (self._model, self._config, self._manifest, self._groups, section)
        valid, question_round = QuestionRound(*of_model, Side.VALID), QuestionRound(*of_model, self._side)
        out = self._folder.path / FOLDER
        made = disturb(
            self._reader,
            self._directory.path_of(max(self._directory.steps())),
            out,
            self._config.model.moe_layers[-section.oracle_layers :],
            section.disturbance,
            seed=self._config.run.seed,
            accuracy=lambda: valid.record()["accuracy"],
        )
        asked = {"questions": question_round.record(), "oracle": question_round.oracle()}
        return {**made, **asked, "samples": make_samples(out, section)}

    def _batches_by_source(self, sequences: int, *, validation: bool = False) -> dict[str, list[Batch]]:
        """Maps each source of the training data to batches of held-out sequences. They are validation sequences in a pilot
        or with `validation`, and test sequences otherwise."""
        config, validation = self._config, validation or self._side is Side.VALID
        return {
            source: heldout_sequences(config, self._manifest, source, sequences, validation=validation)
            for source in source_shares(self._manifest, config.data.weights)
        }

    def _model_at(self, step: int) -> Transformer:
        """Returns the model of a step, with weights averaged over checkpoints. Averaged router thresholds would not fit the
        averaged weights. They are therefore calibrated again on training sequences that the run has seen. With `hold`, the
        loads are set to the budget on validation sequences."""
        model = self._load(self._averaged(step))
        if by_threshold(model):
            config = self._config
            batch, begin = config.train.global_batch, self._first_position()
            positions = [begin + at * batch for at in range(max(0, step - config.evaluation.calibration), step)]
            trained = [each for position in positions for each in self._loader.batches(position)]
            calibrate(model, trained, group_of_modality=self._groups, world=None, steps=step)
        if self._section.hold is not None:
            hold_loads(model, self._validation, self._section.hold, self._groups)
        return model

    @cached_property
    def _validation(self) -> list[Batch]:
        by_source = self._batches_by_source(self._section.sequences, validation=True)
        return [batch for of_source in by_source.values() for batch in of_source]

    @torch.no_grad()
    def _load(self, steps: Sequence[int]) -> Transformer:
        """Averages the weights of the checkpoints at `steps` in float64, and loads the means into the model.

        Router thresholds are averaged, too. Integer tensors are taken from the last checkpoint.

        Raises:
            DataError: a checkpoint is damaged, or the base checkpoint of its adapters is missing.
        """
        sums: dict[str, torch.Tensor] = {}
        for step in steps:
            self._reader.read(self._directory.path_of(step))
            for name, tensor in self._reader.state.tensors().items():
                if tensor.is_floating_point():
                    sums[name] = sums.get(name, 0.0) + tensor.to(torch.float64)  # 8 bytes per weight
        if len(steps) > 1:
            for name, tensor in self._reader.state.tensors().items():
                if name in sums:
                    tensor.copy_(sums[name] / len(steps))
        return self._model

    @cached_property
    def _loader(self) -> Loader:
        return build_loader(self._config, self._manifest, rank=0, world_size=1)

    def _averaged(self, step: int) -> list[int]:
        """Returns the steps of the checkpoints whose weights are averaged for the model of step `step`. With a curve, these
        are all checkpoints in the last fraction `average` of the steps up to `step`; otherwise only `step`."""
        curve = self._section.curve
        if curve is None:
            return [step]
        return [each for each in self._planned() if (1 - curve.average) * step <= each <= step]

    def _planned(self) -> list[int]:
        steps = sorted(self._directory.steps())
        return planned(steps, every=self._config.checkpoint.every, last=self._config.train.steps)

    def _curve(
        self, section: CurveSection, spent: Mapping[int, Spent], training: Mapping[int, Mapping[str, float]]
    ) -> list[dict[str, Any]]:
        batches = [batch for of_source in self._batches_by_source(section.sequences).values() for batch in of_source]
        points = []
        for step in self._planned():
            tokens = evaluate(self._model_at(step), batches, self._groups, image=self._image)
            load = loads(tokens)["all"]
            costs = {"step": step, **asdict(spent[step])}
            points.append({**costs, "loss": losses(tokens), "training": training.get(step, {}), "load": load})
        return points

    def _load_tables(self, model: Transformer) -> dict[str, str]:
        """Writes two tables [MoE layers, V] for the router `top_k_by_id`: the mean number of true experts per token, over
        the tokens with this id, and over all tokens of the id's modality. Returns the paths of the tables. The means are
        over the last TABLE_STEPS training steps or, with `hold`, over the validation sequences on which the loads are set.
        An id that does not occur in these sequences gets the mean of its modality."""
        batches = self._trained_last() if self._section.hold is None else self._validation
        tokens = evaluate(model, batches, self._groups, image=self._image)
        paths = {}
        image_V = np.zeros(self._config.model.vocab_size, bool)
        for first, end in self._manifest.modalities["image"]:
            image_V[first:end] = True
        by_id_LV, by_modality_LV = tables_of(tokens, image_V)
        for name, table_LV in (("by_id", by_id_LV), ("by_modality", by_modality_LV)):
            paths[f"{name}_folder"] = str(path := self._folder.path / f"loads_{name}.npy")
            np.save(path, table_LV)
        return paths

    def _trained_last(self) -> list[Batch]:
        batch, begin = self._config.train.global_batch, self._first_position()
        steps = range(max(0, self._config.train.steps - TABLE_STEPS), self._config.train.steps)
        return [each for step in steps for each in self._loader.batches(begin + step * batch)]

    def _first_position(self) -> int:
        """Returns the run's first position in the training stream. It is above 0 only with run.keep_position."""
        state = open_checkpoint(self._directory.path_of(max(self._directory.steps()))).state
        progress = state.values["progress"]
        assert isinstance(progress, dict), "a checkpoint of training has counters"
        return int(str(progress.get("first_position", 0)))

    def _frequency(self) -> np.ndarray:
        """Returns ln(1 + n) for each token id, float64 [V]. The id occurs n times in the training data."""
        counts = np.zeros(self._manifest.vocab_size, np.int64)
        for source in self._manifest.sources.values():
            split = IndexedSplit(self._config.data.path, source.train)
            counts += np.bincount(split.tokens(0, split.header.tokens), minlength=len(counts))
        return np.log1p(counts)

    @torch.no_grad()
    def _wire(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        if self._config.model.moe.experts.replicated:
            return dict.fromkeys(ROWS, 0.0)  # no row is sent, because each rank has all experts
        count = SentRows(spread(self._placement, self._section.wire.ep))
        with recorded_routers(self._model) as seen:
            for batch in batches:
                seen.clear()
                forward(self._model, batch, self._groups)
                ranks = rank_of_tokens(len(batch.tokens_BS), batch.tokens_BS.shape[1], self._section.wire.ep)
                for each in seen:
                    count.add(each.routing, ranks[each.index_T.numpy()])
        return count.per_token()

    @torch.no_grad()
    def _probe_threshold(self, batches: Sequence[Batch]) -> list[dict[str, Any]]:
        """Measures the loss if second experts of low weight are dropped, so that tokens have fewer experts. For each number
        of experts, a first pass over all batches finds the bound; second experts with a lower weight are dropped."""
        second: list[torch.Tensor] = []
        with recorded_routers(self._model) as seen:
            for batch in batches:
                seen.clear()
                forward(self._model, batch, self._groups)
                real_T = ~batch.padding_BS.flatten()
                second += [probes.second_weights(each.routing, len(each.index_T))[real_T] for each in seen]
        points = []
        for load in self._section.threshold_loads:
            bound = probes.bound_for_load(torch.cat(second), load)
            points.append(
                self._changed(batches, probes.routers(self._model), probes.threshold(bound), at=load) | {"bound": bound}
            )
        return points

    def _probe_flip(self, batches: Sequence[Batch]) -> list[dict[str, Any]]:
        """Measures the loss after some of the tokens that experts (or mixture-of-depths layers) chose are replaced by
        tokens that they did not choose."""
        modules: Sequence[nn.Module] = self._model.depth_routers()
        flip = probes.flip_depths
        if not modules:
            modules, flip = probes.routers(self._model), probes.flip
        return [self._changed(batches, modules, flip(percent, seed=0), at=percent) for percent in self._section.flips]

    def _probe_hindsight(self, batches: Sequence[Batch]) -> list[dict[str, Any]]:
        """Measures the loss if routers select with the selection of training, which sees later tokens. If this loss is
        lower than the loss with the usual selection, information about later tokens leaks into the prediction."""
        with choice_of_training(probes.routers(self._model), max(self._directory.steps())):
            return [self._point(batches, at=0.0)]

    def _changed(
        self, batches: Sequence[Batch], modules: Sequence[nn.Module], change: probes.Change, *, at: float
    ) -> dict[str, Any]:
        with probes.changed_routing(modules, change):
            return self._point(batches, at=at)

    def _point(self, batches: Sequence[Batch], *, at: float) -> dict[str, Any]:
        tokens = evaluate(self._model, batches, self._groups, image=self._image)
        return {"at": at, "loss": losses(tokens), "load": loads(tokens)["all"]}


def planned(steps: Sequence[int], *, every: int, last: int) -> list[int]:
    """Returns the `steps` at which every run of this configuration has a checkpoint. A run that was stopped and resumed has
    one more checkpoint. It must not count in means of weights, because the other runs lack it."""
    return [step for step in steps if step % every == 0 or step == last]


@reports_errors()
def main(
    study: Annotated[Path, typer.Argument(help="The experiment's file.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the run.")],
    wanted: Annotated[str, typer.Argument(help="Probes, separated by commas; may be empty.")] = "",
    before: Annotated[str, typer.Argument(help="JSON of tokens, flops, seconds and bytes spent before the run.")] = "{}",
    asks: Annotated[
        str,
        typer.Option(help="Further measurements, separated by commas: samples, oracle, disturbed, load_tables, domains."),
    ] = "",
    pilot: Annotated[bool, typer.Option("--pilot", help="Take the validation side of sequences and questions.")] = False,
) -> None:
    """Measure one finished run."""
    torch.set_num_threads(1)
    side = Side.VALID if pilot else Side.TEST
    measurement = Measurement(folder, load_study(study).measure, Spent(**json.loads(before)), side=side)
    record = measurement.record(*([name for name in names.split(",") if name] for names in (wanted, asks)))
    write_atomically(folder / MEASURED, json.dumps(record) + "\n")


if __name__ == "__main__":
    run_command(main)
