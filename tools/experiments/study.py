"""The schema of an experiment, configs/reproduce/NAME.yaml: frozen and strict, like the configuration of a run.

An arm is a configuration, with one run for each seed. Runs of one seed see the same data in the same order, so that their
differences are paired. `after` starts a run from the weights of another arm's run of the same seed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from moe_dist.config.bundled import find_config, source_root
from moe_dist.config.load import load_config
from moe_dist.config.schema import Config
from moe_dist.config.yaml_text import load_yaml
from moe_dist.errors import ConfigError
from tools.experiments.measure_schema import MeasureSection
from tools.experiments.values import ArmName, EtaValue, Part, ValueRule, arms_of

FOLDER = Path("configs/reproduce")
ROOT = Path("runs/reproduce")
RESULTS = Path("docs/reproductions")
PILOT = "pilot"
SHAPE = ("model.num_layers", "model.moe.every", "model.moe.first")  # keys that determine the number of MoE layers
VARIANT = "~"  # separates an arm from its variant in a pilot; not allowed in names of arms

Settings = dict[str, Any]


class MeasuredSetting(Part):
    """A key that is set to what another arm's record says, of the same seed."""

    arm: ArmName
    metric: str


class Arm(Part):
    """One configuration."""

    about: str
    set: Settings = Field(default_factory=dict)
    after: ArmName | None = None
    carry: bool = False  # add the cost of the arm before it
    measured: dict[str, MeasuredSetting] = Field(default_factory=dict)
    seeds: Literal["decisive", "other"] = "other"
    probes: tuple[Literal["threshold", "flip", "hindsight"], ...] = ()
    asks: tuple[Literal["samples", "oracle"], ...] = ()  # besides the questions of every run

    @property
    def needs(self) -> tuple[str, ...]:
        """Arms whose records of the same seed must exist first."""
        arms = [self.after, *(each.arm for each in self.measured.values())]
        return tuple(dict.fromkeys(arm for arm in arms if arm))


class Seeds(Part):
    decisive: tuple[int, ...] = Field(min_length=2)
    other: tuple[int, ...] = Field(min_length=2)


class PilotSection(Part):
    """Runs that fix learning rate, steps and coefficients; on other seeds, never reported."""

    seeds: tuple[int, ...] = Field(min_length=1)
    arms: tuple[ArmName, ...] = ()
    variants: dict[ArmName, dict[ArmName, Settings]] = Field(default_factory=dict)
    found: str = ""


class Study(Part):
    """A whole experiment."""

    name: ArmName
    question: str
    base: str
    set: Settings = Field(default_factory=dict)
    seeds: Seeds
    pilot: PilotSection
    measure: MeasureSection = Field(default_factory=MeasureSection)
    not_testable: str = ""  # set if the pilot lacked something; then no rule is judged
    arms: dict[ArmName, Arm] = Field(min_length=1)
    rules: tuple[ValueRule, ...] = ()

    @model_validator(mode="after")
    def _names_are_there(self) -> "Study":
        wanted = {needed for arm in self.arms.values() for needed in arm.needs}
        wanted |= {name for rule in self.rules for value in (rule.lower, rule.higher) for name in arms_of(value)}
        wanted |= set(self.pilot.arms) | set(self.pilot.variants)
        if self.measure.curve is not None and self.measure.curve.of is not None:
            wanted.add(self.measure.curve.of)
        if unknown := sorted(wanted - set(self.arms)):
            raise ValueError(f"arms names {', '.join(self.arms)}; {', '.join(unknown)} are named and not among them")
        seen: set[str] = set()
        for name, arm in self.arms.items():
            if late := sorted(set(arm.needs) - seen):
                raise ValueError(f"arms.{name} needs {', '.join(late)}, which must stand before it")
            few = [n for n in arm.needs if not set(self.seeds_of(arm)) <= set(self.seeds_of(self.arms[n]))]
            if few:
                raise ValueError(f"arms.{name} has seeds that {', '.join(few)} lacks; give that one the decisive seeds")
            seen.add(name)
        values = [value for rule in self.rules for value in (rule.lower, rule.higher) if isinstance(value, EtaValue)]
        costed = {name for value in values for name in arms_of(value)}
        if self.measure.curve is not None and self.measure.curve.of is not None:
            costed.add(self.measure.curve.of)
        if part := sorted(costed - set(self.with_whole_cost())):
            raise ValueError(f"eta needs what all of {part[0]}'s training cost; set arms.{part[0]}.carry, or leave it out")
        question_round = [name for name, arm in self.arms.items() if arm.asks]
        if question_round and self.measure.questions is None:
            raise ValueError(f"arms.{question_round[0]}.asks needs measure.questions, which says what is asked")
        if both := sorted(set(self.pilot.seeds) & {*self.seeds.decisive, *self.seeds.other}):
            raise ValueError(f"pilot.seeds has {both}, which count: a pilot runs on other seeds")
        return self

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        return self.seeds.decisive if arm.seeds == "decisive" else self.seeds.other

    def with_whole_cost(self) -> list[str]:
        """Arms whose records include all their training cost: an arm that continues another needs `carry`."""

        def whole(arm: Arm) -> bool:
            return arm.after is None or (arm.carry and whole(self.arms[arm.after]))

        return [name for name, arm in self.arms.items() if whole(arm)]


@dataclass(frozen=True)
class StudyJob:
    """One run and its measurement.

    Attributes:
        label: The arm's name, in a pilot followed by a variant.
        settings: Keys over the base configuration, in order; measured ones are added when the job starts.
    """

    label: str
    arm: Arm
    seed: int
    settings: Mapping[str, Any]


def load_study(path: Path) -> Study:
    """Reads an experiment.

    Raises:
        ConfigError: lists every fault.
    """
    try:
        text = path.read_text()
    except OSError as error:
        there = ", ".join(
            sorted(each.stem for each in (source_root() / FOLDER).glob("*.yaml") if not each.stem.endswith("base"))
        )
        raise ConfigError(f"{path}: {error.strerror}; there are {there or 'none'}") from error
    values, problems = load_yaml(text)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    try:
        # Validate as JSON, in which a list is accepted for a tuple.
        return Study.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problems = [f"{path}: {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ConfigError(problems) from error


def fingerprint(study_path: Path, study: Study) -> str:
    """Hash of all rules: the study's file and its base, byte for byte."""
    digest = hashlib.sha256()
    for path in (study_path, find_config(study.base)):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def jobs_of(study: Study, *, pilot: bool = False) -> list[StudyJob]:
    """Every run, arm by arm in the file's order, in which a base comes before the arms that start from it."""
    if pilot:
        return _pilot_jobs(study)
    return [_job(study, name, arm, seed, {}) for name, arm in study.arms.items() for seed in study.seeds_of(arm)]


def _pilot_jobs(study: Study) -> list[StudyJob]:
    """The pilot's arms, the arms that they need, and its variants."""
    wanted: set[str] = set()
    for name in (*study.pilot.arms, *study.pilot.variants):
        _with_needs(study, name, wanted)
    wanted -= set(study.pilot.variants) - set(study.pilot.arms) - _needed(study, wanted)
    jobs = []
    for seed in study.pilot.seeds:
        for name, arm in study.arms.items():
            if name in wanted:
                jobs.append(_job(study, name, arm, seed, {}))
            for variant, settings in study.pilot.variants.get(name, {}).items():
                jobs.append(_job(study, f"{name}{VARIANT}{variant}", arm, seed, settings))
    return jobs


def _needed(study: Study, names: set[str]) -> set[str]:
    return {needed for name in names for needed in study.arms[name].needs}


def _with_needs(study: Study, name: str, into: set[str]) -> None:
    into.add(name)
    for other in _needed(study, {name}):
        _with_needs(study, other, into)


def _job(study: Study, label: str, arm: Arm, seed: int, extra: Settings) -> StudyJob:
    return StudyJob(label, arm, seed, {**study.set, **arm.set, **extra})


def run_folder(study: Study, label: str, seed: int, *, pilot: bool) -> Path:
    """Folder of a run."""
    return ROOT / (f"{study.name}-{PILOT}" if pilot else study.name) / label.replace(VARIANT, "_") / f"seed-{seed}"


def overrides_of(study: Study, job: StudyJob, measured: Mapping[str, Any], *, pilot: bool) -> list[str]:
    """The launcher's overrides of the base configuration: key=value, in JSON, which is YAML."""
    folder = run_folder(study, job.label, job.seed, pilot=pilot)
    settings: dict[str, Any] = {"run.name": folder.name, "run.root": str(folder.parent), "run.seed": job.seed}
    if job.arm.after is not None:
        settings["run.init_from"] = str(run_folder(study, job.arm.after, job.seed, pilot=pilot))
    settings |= {**job.settings, **measured}
    return [_override(key, value) for key, value in settings.items()]


def config_of(study: Study, job: StudyJob, *, pilot: bool = False) -> Config:
    """The configuration of a run. Values still to be measured are replaced: an active number of experts by 1.5, a folder by
    one that does not exist.

    Raises:
        ConfigError: the arm's settings are not valid.
    """
    shape = {key: value for key, value in job.settings.items() if key in SHAPE}
    layers = len(load_config(study.base, [_override(*each) for each in shape.items()]).model.moe_layers)
    stand_in = {key: _stand_in(value, layers) for key, value in job.arm.measured.items()}
    return load_config(study.base, overrides_of(study, job, stand_in, pilot=pilot))


def _stand_in(value: MeasuredSetting, layers: int) -> Any:
    if value.metric.endswith("folder"):
        return str(ROOT / value.arm / "still-to-come")
    return [1.5] * layers if value.metric.endswith("by_layer") else 1.5


def _override(key: str, value: Any) -> str:
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"
