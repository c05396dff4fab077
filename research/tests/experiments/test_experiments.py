"""The experiments that come with the project: every arm is a run that could start."""

from itertools import pairwise
from pathlib import Path

import pytest

from moe_dist.config.model_schema import ModelSection
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest, SourceSection, SplitSection
from moe_dist.plan.preflight import layout_without_data, manifest_violations
from research.experiments.convention_data import CONVENTIONS
from research.experiments.domain_data import DOMAINS, PARALLEL, TEXTS, alphabets
from research.experiments.study import Study, StudyJob, config_of, jobs_of, load_study, overrides_of
from tests.support.messages import refused

NAMES = (
    "adamoe",
    "adamoe-held",
    "moma",
    "moma-narrow",
    "nulls-by-modality",
    "mole",
    "roma",
    "roma-2",
    "adamoe-2",
    "nulls-2",
    "mole-2",
    "on-ranks",
    "moma-2",
)
REPOSITORY = Path(__file__).parents[3]
DECISIVE, OTHER = 5, 3


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def study_of(name: str) -> Study:
    return load_study(Path(f"research/configs/reproduce/{name}.yaml"))


def texts() -> Manifest:
    """Of the data that `make smollm2-split` prepares."""
    split = SplitSection(path="x", documents=2, tokens=2, tokens_by_modality={"text": 2})
    source = SourceSection(train=split, valid=split, licence="")
    modalities = {"text": ((0, 49152),)}
    return Manifest(name="x", vocab_size=49152, modalities=modalities, pad_id=2, eos_id=2, sources={"text": source})


def manifest(path: str) -> Manifest:
    """Of the data that `make reproduce-data`, `conventions-data`, `questions-data`, `facts-data` and
    `domains-data` prepare."""
    names = ["openmoji", "python"]
    if path.endswith("questions"):
        names += ["wordnet", "reasoning"]
    if path.endswith("conventions"):
        names = [f"{name}{more}" for name in CONVENTIONS for more in ("", "-twice")]
    vocab_size, first_code = 2560, 2048
    if path.endswith("facts"):
        names, vocab_size, first_code = ["openmoji", "facts"], 1280, 1024
    modalities = {"text": ((0, first_code),), "image": ((first_code, vocab_size),)}
    if path.endswith("domains"):
        names = [PARALLEL, TEXTS, *(f"{name}{more}" for name in DOMAINS for more in ("", "-twice"))]
        ends = [each.end for each in alphabets(64)]
        vocab_size = ends[-1]
        modalities = {name: (part,) for name, part in zip(DOMAINS, pairwise([0, *ends]), strict=True)}
    split = SplitSection(path="x", documents=2, tokens=2, tokens_by_modality=dict(zip(modalities, (1, 1), strict=False)))
    source = SourceSection(train=split, valid=split, licence="")
    return Manifest(
        name="x",
        vocab_size=vocab_size,
        modalities=modalities,
        pad_id=0,
        eos_id=1,
        sources=dict.fromkeys(names, source),
    )


def jobs_once(study: Study) -> list[StudyJob]:
    """One job of each arm, and of each variant of the pilot."""
    every = {job.label: job for job in (*jobs_of(study), *jobs_of(study, pilot=True))}
    return list(every.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_is_a_run_that_could_start(name: str) -> None:
    study = study_of(name)
    for job in jobs_once(study):
        if "model.mixture_of_depths" in job.settings and "mixture_of_depths" not in ModelSection.model_fields:
            with refused(ConfigError, "model.mixture_of_depths"):
                config_of(study, job)
            continue
        config = config_of(study, job)
        layout = layout_without_data(config)
        assert not list(manifest_violations(config, layout.groups, manifest(config.data.path)))
        assert layout.placement.num_ranks == config.parallel.ep
        assert config.run.seed == job.seed
        if config.router_tuning is None:
            assert config.train.global_batch * config.data.seq_len == 2048


@pytest.mark.parametrize("name", ["roma-2-smollm2", "roma-2-equal", "roma-2-disturbed"])
def test_arms_of_smollm2_begin_with_its_mixture_and_tune_routers_alone(name: str) -> None:
    study = study_of(name)
    for job in jobs_once(study):
        config = config_of(study, job)
        layout = layout_without_data(config)
        assert not list(manifest_violations(config, layout.groups, texts()))
        assert (config.train.only is None) == (job.label == "base")
        if job.label == "base":
            assert config.run.init_from == ".cache/hf/smollm2-split"
            assert config.train.steps * config.optimizer.lr < 1e-11, "no weight is trained"
    seeds = OTHER if name == "roma-2-smollm2" else DECISIVE
    assert all(len(study.seeds_of(study.arms[arm])) == seeds for rule in study.rules for arm in rule.arms)


@pytest.mark.parametrize("name", ["roma-2", "roma-2-smollm2", "roma-2-disturbed"])
def test_cross_entropy_and_roma_have_the_same_search_of_the_learning_rate(name: str) -> None:
    study = study_of(name)
    (one, other) = (
        [job.settings for job in jobs_of(study, pilot=True) if job.label.startswith(arm)] for arm in ("ce", "roma")
    )
    rates = [sorted({settings["optimizer.lr"] for settings in arm}) for arm in (one, other)]
    assert len(rates[0]) == 3
    assert rates[0] == rates[1]
    tuned = [job.settings for job in jobs_of(study) if job.label != "base"]
    assert {settings["optimizer.lr"] for settings in tuned} <= set(rates[0])
    assert {settings["router_tuning.objective"] for settings in tuned} == {"choices"}


def test_roma_2_equal_compares_the_same_rates() -> None:
    study = study_of("roma-2-equal")
    rates = {job.label: job.settings.get("optimizer.lr") for job in jobs_of(study)}
    for rule in study.rules:
        assert sorted(rates[arm] for arm in rule.arms if arm.startswith("ce")) == [1e-3, 3e-3]
        assert {arm.replace("ce", "roma") for arm in rule.arms} == {arm for arm in rule.arms if arm.startswith("roma")}


@pytest.mark.parametrize("name", ["roma-2", "roma-2-disturbed"])
def test_tuned_arms_begin_with_the_disturbed_routers(name: str) -> None:
    """`measured` comes after `after`, whose run has undisturbed routers."""
    study = study_of(name)
    for job in jobs_of(study):
        if job.label != "base":
            measured = {key: f"there/{key}" for key in job.arm.measured}
            assert "run.init_from=there/run.init_from" in overrides_of(study, job, measured, pilot=False)
            assert job.arm.measured["run.init_from"].metric == "disturbed.folder"
            size = job.label.strip("abcdefghijklmnopqrstuvwxyz")
            assert job.arm.measured["router_tuning.data"].metric == f"disturbed.samples.sizes.{size}.folder"


@pytest.mark.parametrize("name", NAMES)
def test_arms_that_a_rule_decides_on_have_five_seeds(name: str) -> None:
    """Three in roma-2-smollm2, which says why."""
    study = study_of(name)
    decisive = OTHER if name == "roma-2-smollm2" else DECISIVE
    assert study.rules
    assert len(study.seeds.other) in (OTHER, DECISIVE)
    for rule in (*study.gates, *study.rules):
        for arm in rule.arms:
            assert len(study.seeds_of(study.arms[arm])) == decisive


@pytest.mark.slow
def test_the_budget_is_about_sixty_million_tokens_an_experiment() -> None:
    for name in NAMES:
        study = study_of(name)
        steps = [
            config_of(study, job).train.steps
            for job in jobs_of(study)
            if "model.mixture_of_depths" not in job.settings or "mixture_of_depths" in ModelSection.model_fields
        ]
        # The model of mole-2 is so small that starts and measurements of its 93 runs take as long as their steps.
        most_tokens, most_steps = (110e6, 2400) if name == "mole-2" else (66e6, 1500)
        assert sum(steps) * 2048 < most_tokens, name
        assert max(steps) <= most_steps


def test_arms_that_go_on_from_anothers_at_no_cost_of_their_own_are_not_set_against_costs(tmp_path: Path) -> None:
    arms = study_of("moma").with_whole_cost()
    assert "upcycled" in arms, "its seed's cost is carried"
    assert "auxiliary" not in arms
    text = (REPOSITORY / "research/configs/reproduce/moma.yaml").read_text()
    path = tmp_path / "moma.yaml"
    path.write_text(text.replace("{eta: mixed8, of: dense, part: image}", "{eta: auxiliary, of: dense, part: image}"))
    with refused(ConfigError):
        load_study(path)
