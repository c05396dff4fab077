"""The trace of a trained run: its counts are those of the held-out evaluation; what cannot be traced is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import Result

from moe_dist.data.batch import IGNORED
from moe_dist.data.loader import heldout_batches
from moe_dist.inference.loaded_run import find_trained
from moe_dist.monitor.trace.reader import read_trace
from moe_dist.train.evaluation.heldout import heldout_losses
from tests.support.invoked import invoke
from tests.support.pictured import pictured_run
from tools.trace import main

pytestmark = pytest.mark.slow


def call(*arguments: object) -> Result:
    return invoke(main, *arguments)


@pytest.fixture(scope="module")
def run(own_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured_run(own_data, tmp_path_factory.mktemp("traced"), model__mixture_of_depths=None)


def test_the_counts_are_those_of_an_evaluation(run: Path) -> None:
    done = call(run, "--sequences", 3)
    assert done.exit_code == 0, done.output
    trace = read_trace(run / "traces" / "step_2")
    assert trace.steps == (2,)
    found = trace.step(2)
    trained = find_trained(run)
    config = trained.config
    batches = [
        batch
        for source in trained.manifest.sources
        for batch in heldout_batches(
            config.data.path, trained.manifest, source=source, seq_len=96, sequences=3, micro_batch=2, rank=0, world_size=1
        )
    ]
    heldout = heldout_losses(
        trained.load(torch.device("cpu")),
        batches,
        modalities=tuple(trained.manifest.modalities),
        group_of_modality=torch.tensor(trained.group_of_modality),
        world=None,
    )
    assert heldout.choices_LC is not None
    assert np.array_equal(found.choices(), heldout.choices_LC)
    assert np.array_equal(found.tokens["token"], np.concatenate([b.tokens_BS[~b.padding_BS].numpy() for b in batches]))
    label_T, modality_T = (
        np.concatenate([getattr(b, name)[~b.padding_BS].numpy() for b in batches])
        for name in ("labels_BS", "label_modality_BS")
    )
    assert found.losses is not None
    assert np.array_equal(np.isnan(found.losses), label_T == IGNORED)
    for m, name in enumerate(trained.manifest.modalities):  # float16 has 11 bits
        of_modality = found.losses[(label_T != IGNORED) & (modality_T == m)].astype(np.float64)
        assert of_modality.mean() == pytest.approx(heldout.loss[name], rel=2e-3)
    assert len(np.unique(found.tokens["sequence"])) == sum(int((~b.padding_BS).any(1).sum()) for b in batches)
    assert (found.manifest.split, found.manifest.rank_of_expert) == ("held-out", (0, 0, 0, 0))
    again = call(run)
    assert again.exit_code == 78
    assert "step_2: it exists, and a trace is never overwritten" in again.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--step", "7"), 78, "has checkpoints of the steps 2"),
        (("--data", "nowhere"), 78, "no manifest.json"),
        (("--out", "/dev/null/x/y"), 78, "--out /dev/null/x/y: not writable"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(run: Path, options: tuple[str, ...], code: int, message: str) -> None:
    done = call(run, *options)
    assert (done.exit_code, message in done.stderr) == (code, True), done.output


def test_a_trace_that_could_not_be_written_is_no_success(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_dist.monitor.trace.writer.content_check", lambda *_: 1 / 0)
    done = call(run, "--sequences", 1, "--out", tmp_path / "broken")
    assert done.exit_code == 1
    assert "broken/heldout: the trace is incomplete" in done.stderr


def test_a_model_whose_choices_do_not_fit_is_refused(own_run: Path) -> None:
    done = call(own_run)
    assert done.exit_code == 78
    assert "model.mixture_of_depths: needs the choices of all tokens" in done.stderr
