"""Every arm of the experiments in research/ has a configuration with which a run could start."""

from itertools import pairwise
from pathlib import Path

import pytest

from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest, SourceSection, SplitSection
from moe_dist.plan.preflight import layout_without_data, manifest_violations
from research.experiments.convention_data import CONVENTIONS
from research.experiments.domain_data import DOMAINS, PARALLEL, TEXTS, alphabets
from research.experiments.study import Study, StudyJob, config_of, jobs_of, load_study
from tests.support.messages import refused

REPOSITORY = Path(__file__).parents[3]
STUDIES = (path.stem for path in (REPOSITORY / "research/configs/reproduce").glob("*.yaml"))
NAMES = sorted(name for name in STUDIES if not name.endswith("base") and not name.startswith("roma-2-"))  # needs SmolLM2


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def study_of(name: str) -> Study:
    return load_study(Path(f"research/configs/reproduce/{name}.yaml"))


def manifest(path: str) -> Manifest:
    """Returns a manifest like that of the data at `path` (of `make reproduce-data` and similar targets)."""
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
        name="x", vocab_size=vocab_size, modalities=modalities, pad_id=0, eos_id=1, sources=dict.fromkeys(names, source)
    )


def jobs_once(study: Study) -> list[StudyJob]:
    """Returns one job of each arm, and of each variant of the pilot."""
    every = {job.label: job for job in (*jobs_of(study), *jobs_of(study, pilot=True))}
    return list(every.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_is_a_run_that_could_start(name: str) -> None:
    study = study_of(name)
    for job in jobs_once(study):
        config = config_of(study, job)
        layout = layout_without_data(config)
        assert not list(manifest_violations(config, layout.groups, manifest(config.data.path)))
        assert layout.placement.num_ranks == config.parallel.ep
        assert config.run.seed == job.seed
        if config.router_tuning is None:
            assert config.train.global_batch * config.data.seq_len == 2048


def test_arms_that_go_on_from_anothers_at_no_cost_of_their_own_are_not_set_against_costs(tmp_path: Path) -> None:
    arms = study_of("moma").with_whole_cost()
    assert "upcycled" in arms, "its seed's cost is carried"
    assert "auxiliary" not in arms
    text = (REPOSITORY / "research/configs/reproduce/moma.yaml").read_text()
    path = tmp_path / "moma.yaml"
    path.write_text(text.replace("{eta: mixed8, of: dense, part: image}", "{eta: auxiliary, of: dense, part: image}"))
    with refused(ConfigError):
        load_study(path)
