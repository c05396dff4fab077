"""Defines the schema of an experiment, research/configs/reproduce/NAME.yaml. Like the configuration of a run, its classes
are frozen and strict.

An arm is a configuration that is trained once with each seed. Runs with the same seed see the same data in the same order,
so that differences between arms are paired. With `after`, a run starts from the weights of another arm's run with the same
seed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from moe_dist.config.bundled import find_config
from moe_dist.config.load import load_config
from moe_dist.config.schema import Config
from moe_dist.config.yaml_text import load_yaml
from moe_dist.errors import ConfigError
from research.experiments.additions import FILE as ADDITIONS
from research.experiments.additions import read_additions
from research.experiments.rules import CONFIDENCE, ArmName, ArmValue, EtaValue, Part, ValueRule

RESEARCH = Path(__file__).parents[1]
FOLDER = Path("configs/reproduce")  # below RESEARCH
ROOT = Path("runs/reproduce")
RESULTS = Path("research/records/reproductions")
PILOT = "pilot"
SHAPE = ("model.num_layers", "model.moe.every", "model.moe.first")  # keys that determine the number of MoE layers
VARIANT = "~"  # separates arm and variant in the run names of a pilot; not allowed in names of arms
LEFT = 500  # number of training questions of each task that are used only to tune routers, not to train a base model

Settings = dict[str, Any]
# The default that the schema had when the base configurations in FOLDER were written. These configurations may not change.
EARLIER: Settings = {"loss.balance.scope": "micro_batch"}


# --- sections that describe the measurements of a finished run


class CurveSection(Part):
    """Measures the held-out loss during a run, at each checkpoint. The measured model's weights are a mean over the
    checkpoints in the last fraction `average` of the steps up to this checkpoint."""

    average: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    sequences: PositiveInt = 64
    of: ArmName | None = None  # the arm of reference: all other arms' curves are compared with its curve


class WireSection(Part):
    """The EP group for which the token rows sent to other ranks are counted."""

    ep: PositiveInt = 4
    placement: Literal["interleaved"] = "interleaved"


class DisturbanceSection(Part):
    """Noise on the router rows of the last `oracle_layers` MoE layers; its scale is in standard deviations of the rows."""

    scales: tuple[PositiveFloat, ...] = Field(default=(0.5, 1.0, 2.0, 4.0), min_length=1)  # tried in this order
    keep: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5  # largest fraction of the accuracy above chance that may remain


class QuestionsSection(Part):
    """Multiple-choice questions, scored by log-likelihood per token. A pilot asks the validation questions."""

    tasks: tuple[str, ...] = Field(min_length=1)
    limit: PositiveInt | None = None  # largest number of questions per task; None for no limit
    wordnet: str = ".cache/package/dict"
    embedder: str | None = None  # folder of the embedder; by default the folder of `make embedder`
    least: NonNegativeInt = 0  # smallest allowed number of test questions of all tasks together
    left: Annotated[int, Field(ge=1, le=LEFT)] = LEFT  # number of training questions per task in `samples`
    first_token: bool = False  # whether choices are scored by first tokens; if this is impossible, the question is left out
    sizes: tuple[PositiveInt, ...] = ()  # sizes of the subsets of `samples` to make
    disturbance: DisturbanceSection = Field(default_factory=DisturbanceSection)  # used by arms that ask for `disturbed`
    listed: bool = False  # whether questions list their choices; an answer is right if it is right in each rotation of them
    oracle_questions: PositiveInt = 100  # number of first questions of each task that the oracle answers
    oracle_layers: PositiveInt = 5  # number of last MoE layers whose routing the oracle fits


class MeasureSection(Part):
    """The measurements of each finished run."""

    sequences: PositiveInt = 256
    accuracy: bool = False  # whether to measure the fraction of labels that are the model's most likely token
    curve: CurveSection | None = None
    hold: PositiveFloat | None = None  # number of true experts per token to which the model is set on validation sequences
    wire: WireSection = Field(default_factory=WireSection)
    threshold_loads: tuple[PositiveFloat, ...] = ()
    flips: tuple[PositiveFloat, ...] = ()  # percentages; only for arms whose experts or layers choose tokens
    questions: QuestionsSection | None = None


# --- arms and rules


class MeasuredSetting(ArmValue):
    """Sets a key of the configuration to a number in the record of another arm's run with the same seed."""


class Arm(Part):
    """One configuration, which is trained once with each of its seeds."""

    about: str
    set: Settings = Field(default_factory=dict)
    after: ArmName | None = None
    carry: bool = False  # whether the costs in the record include the costs of the arm `after`
    measured: dict[str, MeasuredSetting] = Field(default_factory=dict)
    seeds: Literal["decisive", "other"] = "other"
    probes: tuple[Literal["threshold", "flip", "hindsight"], ...] = ()
    # Additional measurements of this arm's runs.
    asks: tuple[Literal["samples", "oracle", "disturbed", "load_tables", "domains"], ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """Returns the arms that must have records with the same seed before a run of this arm starts."""
        arms = [self.after, *(each.arm for each in self.measured.values())]
        return tuple(dict.fromkeys(arm for arm in arms if arm))


class Seeds(Part):
    decisive: tuple[int, ...] = Field(min_length=2)
    other: tuple[int, ...] = Field(min_length=2)


class PilotSection(Part):
    """Pilot runs determine learning rate, steps and coefficients. They have their own seeds, and are never reported."""

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
    runs: str = str(ROOT)  # folder of the runs
    records: str = str(RESULTS)  # folder of the records
    names: dict[ArmName, str] = Field(default_factory=dict)  # short names of arms, for tables
    not_testable: str = ""  # why no rule can be judged on the study's runs; empty if rules can be judged
    arms: dict[ArmName, Arm] = Field(min_length=1)
    gates: tuple[ValueRule, ...] = ()  # if a gate fails, no rule of `rules` is judged; the arms of gates run first
    rules: tuple[ValueRule, ...] = ()
    corrected: bool = False  # whether all upper bounds together, not each alone, hold with 95 % confidence (Bonferroni)
    committed_code: bool = False  # whether runs that count need code without uncommitted changes

    @property
    def confidence(self) -> float:
        """The confidence of the one-sided bound of each rule and of each gate."""
        return 1.0 - (1.0 - CONFIDENCE) / (max(1, len(self.rules)) if self.corrected else 1)

    @property
    def base_path(self) -> Path:
        return find_file(self.base)

    @property
    def gate_arms(self) -> frozenset[str]:
        """Returns the arms that gates compare, and all arms that these arms need."""
        found: list[str] = []
        for name in reversed(self.arms):  # backwards, because an arm comes after the arms that it needs
            if any(name in rule.arms for rule in self.gates) or any(name in self.arms[each].needs for each in found):
                found.append(name)
        return frozenset(found)

    @property
    def reference(self) -> str | None:
        """Returns the arm `curve.of`, with which all other arms' curves are compared."""
        return self.measure.curve.of if self.measure.curve is not None else None

    @model_validator(mode="after")
    def _names_are_there(self) -> "Study":
        reference = set() if self.reference is None else {self.reference}
        wanted = {needed for arm in self.arms.values() for needed in arm.needs} | reference
        wanted |= {name for rule in (*self.gates, *self.rules) for name in rule.arms}
        wanted |= {*self.pilot.arms, *self.pilot.variants}
        if unknown := sorted(wanted - set(self.arms)):
            raise ValueError(f"{', '.join(unknown)}: no such arm; there are {', '.join(self.arms)}")
        seen: set[str] = set()
        for name, arm in self.arms.items():
            if late := sorted(set(arm.needs) - seen):
                raise ValueError(f"arms.{name} needs {', '.join(late)}, which must stand before it")
            few = [n for n in arm.needs if not set(self.seeds_of(arm)) <= set(self.seeds_of(self.arms[n]))]
            if few:
                raise ValueError(f"arms.{name} has seeds that {', '.join(few)} lacks; give that one the decisive seeds")
            seen.add(name)
        values = [
            value
            for rule in (*self.gates, *self.rules)
            for value in (rule.lower, rule.higher)
            if isinstance(value, EtaValue)
        ]
        costed = {name for value in values for name in (value.eta, value.of)} | reference
        if part := sorted(costed - set(self.with_whole_cost())):
            raise ValueError(f"eta needs the whole training cost of {part[0]}; set arms.{part[0]}.carry, or leave it out")
        question_round = [name for name, arm in self.arms.items() if set(arm.asks) - {"load_tables", "domains"}]
        if question_round and self.measure.questions is None:
            raise ValueError(f"arms.{question_round[0]}.asks needs measure.questions, which says what is asked")
        if both := sorted(set(self.pilot.seeds) & {*self.seeds.decisive, *self.seeds.other}):
            raise ValueError(f"pilot.seeds has {both}, which are not the pilot's alone: give it other seeds")
        return self

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        return self.seeds.decisive if arm.seeds == "decisive" else self.seeds.other

    def with_whole_cost(self) -> list[str]:
        """Returns the arms whose records include the whole training cost: arms that start from initial weights, and arms
        with `carry`."""

        def whole(arm: Arm) -> bool:
            return arm.after is None or (arm.carry and whole(self.arms[arm.after]))

        return [name for name, arm in self.arms.items() if whole(arm)]


@dataclass(frozen=True)
class StudyJob:
    """One run and its measurement."""

    label: str  # name of the arm; in a pilot, VARIANT and the name of a variant may follow
    arm: Arm
    seed: int
    settings: Mapping[str, Any]  # overrides of the base configuration, except settings from other arms' records

    @property
    def ranks(self) -> int:
        """Returns the number of ranks that train, for a base with one rank."""
        return int(self.settings.get("parallel.ep", 1))


def find_file(path: str | Path) -> Path:
    """Finds a study or a base configuration by its path below `RESEARCH`, or in the way of `find_config`. A study gives the
    path of its base below `RESEARCH`, because the fingerprint of the study includes the text of this path."""
    inside = RESEARCH / path
    return inside if inside.is_file() else find_config(path)


def load_study(path: Path) -> Study:
    """Reads an experiment.

    Raises:
        ConfigError: the study is invalid. The error lists every fault.
    """
    try:
        text = path.read_text()
    except OSError as error:
        there = sorted(each.stem for each in (RESEARCH / FOLDER).glob("*.yaml") if not each.stem.endswith("base"))
        raise ConfigError(f"{path}: {error.strerror}; there are {', '.join(there) or 'none'}") from error
    values, problems = load_yaml(text)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    try:
        # The study is validated as JSON, because in JSON a list is accepted for a tuple.
        study = Study.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problems = [f"{path}: {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ConfigError(problems) from error
    added = read_additions(Path(study.records), study.name)
    names = {**study.names, **added.names}
    if unknown := sorted(set(names) - set(study.arms)):
        where = f"{path} or {Path(study.records) / ADDITIONS}"
        raise ConfigError(f"{where}: names of {study.name}: {', '.join(unknown)}: no such arm; correct or remove it")
    return study.model_copy(update={"not_testable": study.not_testable or added.not_testable, "names": names})


def fingerprint(study_path: Path, study: Study) -> str:
    """Returns a hash of the study's file and of its base configuration, byte for byte."""
    digest = hashlib.sha256()
    for path in (study_path, study.base_path):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def jobs_of(study: Study, *, pilot: bool = False) -> list[StudyJob]:
    """Returns a job for every run, in the file's order of arms. In the file, an arm comes after the arms that it needs."""
    if pilot:
        return _pilot_jobs(study)
    return [_job(study, name, arm, seed, {}) for name, arm in study.arms.items() for seed in study.seeds_of(arm)]


def _pilot_jobs(study: Study) -> list[StudyJob]:
    """Returns the runs of the pilot's arms, of the arms that these arms need, and of the pilot's variants."""
    wanted: list[str] = []
    for name in reversed(study.arms):  # backwards, because an arm comes after the arms that it needs
        started = [*wanted, *study.pilot.variants]
        if name in study.pilot.arms or any(name in study.arms[other].needs for other in started):
            wanted.append(name)
    jobs = []
    for seed in study.pilot.seeds:
        for name, arm in study.arms.items():
            if name in wanted:
                jobs.append(_job(study, name, arm, seed, {}))
            for variant, settings in study.pilot.variants.get(name, {}).items():
                jobs.append(_job(study, f"{name}{VARIANT}{variant}", arm, seed, settings))
    return jobs


def _job(study: Study, label: str, arm: Arm, seed: int, extra: Settings) -> StudyJob:
    earlier = EARLIER if Path(study.base).parent == FOLDER else {}
    return StudyJob(label, arm, seed, {**earlier, **study.set, **arm.set, **extra})


def run_folder(study: Study, label: str, seed: int, *, pilot: bool) -> Path:
    return (
        Path(study.runs) / (f"{study.name}-{PILOT}" if pilot else study.name) / label.replace(VARIANT, "_") / f"seed-{seed}"
    )


def overrides_of(study: Study, job: StudyJob, measured: Mapping[str, Any], *, pilot: bool) -> list[str]:
    """Returns the overrides with which the launcher changes the base configuration for a run: key=value, with the value as
    JSON (which is YAML)."""
    folder = run_folder(study, job.label, job.seed, pilot=pilot)
    settings: dict[str, Any] = {"run.name": folder.name, "run.root": str(folder.parent), "run.seed": job.seed}
    if job.arm.after is not None:
        settings["run.init_from"] = str(run_folder(study, job.arm.after, job.seed, pilot=pilot))
    settings |= {**job.settings, **measured}
    return [_override(key, value) for key, value in settings.items()]


def config_of(study: Study, job: StudyJob, *, pilot: bool = False) -> Config:
    """Returns the configuration of a run. A setting that another arm has not measured yet gets a substitute: 1.5 for a
    number of experts, or the name of a missing folder for a folder.

    Raises:
        ConfigError: the arm's settings are not valid.
    """
    shape = {key: value for key, value in job.settings.items() if key in SHAPE}
    layers = len(load_config(study.base_path, [_override(*each) for each in shape.items()]).model.moe_layers)
    stand_in = {key: _stand_in(value, layers) for key, value in job.arm.measured.items()}
    return load_config(study.base_path, overrides_of(study, job, stand_in, pilot=pilot))


def _stand_in(value: MeasuredSetting, layers: int) -> Any:
    if value.metric.endswith("folder"):
        return str(ROOT / value.arm / "still-to-come")
    return [1.5] * layers if value.metric.endswith("by_layer") else 1.5


def _override(key: str, value: Any) -> str:
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"
