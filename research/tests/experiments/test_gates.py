"""The arms of an experiment's gates run first. Other arms run only if the gates are judged and pass."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError
from research.experiments import __main__ as command
from research.experiments.results import add_record, results_path
from research.experiments.study import Study, StudyJob, jobs_of
from tests.support.messages import refused

RESEARCH = Path(__file__).parents[2]
ARM = {"about": "", "seeds": "decisive"}
GATE = {
    "claim": "wide is better",
    "lower": {"arm": "wide", "metric": "loss.all"},
    "higher": {"arm": "dense", "metric": "loss.all"},
}
LOSSES = {"dense": 2.0, "wide": 1.5, "experts": 1.0}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Returns a study whose runs are replaced by records with the losses of LOSSES."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "Runner", Recorder)
    monkeypatch.setattr(command, "check_rules", lambda *_: "c0ffee")
    monkeypatch.setattr(command, "check", lambda *_: None)
    monkeypatch.setattr(command, "config_of", lambda *_, **__: load_config(RESEARCH / "configs/reproduce/base.yaml"))
    values = {
        "name": "gated", "question": "", "base": "none", "seeds": {"decisive": [1, 2], "other": [1, 2]},
        "pilot": {"seeds": [9]}, "arms": dict.fromkeys(LOSSES, ARM), "gates": [GATE], "records": str(tmp_path),
    }  # fmt: skip
    return Study.model_validate(values, strict=False)


class Recorder:
    """Replaces `Runner`: adds a record for each job instead of running it."""

    losses = LOSSES

    def __init__(self, _path: Path, study: Study, *_: object, **__: object) -> None:
        self.path = results_path(study, pilot=False)

    def run(self, jobs: Sequence[StudyJob]) -> None:
        for job in jobs:
            # The losses depend on the seed, so that the differences between arms vary.
            record = {"arm": job.label, "seed": job.seed, "loss": {"all": self.losses[job.label] * (1 + job.seed / 1000)}}
            add_record(self.path, {"fingerprint": "x"}, record)


def ran(study: Study, *, only: str = "") -> list[str]:
    """Runs the command, and returns the arms that then have records."""
    jobs = [job for job in jobs_of(study) if not only or job.label == only]
    command._run(Path("gated.yaml"), study, jobs, pilot=False, processes=2)
    return list(dict.fromkeys(arm for arm, _ in command.read_records(results_path(study, pilot=False))))


def test_all_arms_run_if_the_gate_holds(study: Study) -> None:
    assert ran(study) == ["dense", "wide", "experts"]


def test_a_failed_gate_ends_the_experiment(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Recorder, "losses", {**LOSSES, "wide": 2.1})
    assert ran(study) == ["dense", "wide"]
    assert "gate not held: wide is better +0.1" in capsys.readouterr().out


def test_a_flip_of_choices_by_tokens_is_refused(study: Study) -> None:
    arms = {**study.arms, "dense": study.arms["dense"].model_copy(update={"probes": ("flip",)})}
    with refused(ConfigError, "arms.dense.probes: flip"):
        ran(study.model_copy(update={"arms": arms}))


def test_an_arm_alone_does_not_run_before_its_gates(study: Study) -> None:
    with refused(ConfigError, "run the arms of the gates first, without --only"):
        ran(study, only="experts")
    assert not results_path(study, pilot=False).exists()
