"""The trace of a trained run has the same counts as the held-out evaluation. Runs and options that cannot be traced are
refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.data.batch import IGNORED
from moe_dist.data.loader import heldout_batches
from moe_dist.inference.loaded_run import find_trained
from moe_dist.moe.routing.types import Assignments
from moe_dist.monitor.trace.reader import read_trace
from moe_dist.train.evaluation.heldout import heldout_losses
from moe_dist.train.objective.loss import forward
from tests.support.cover import rest_full
from tests.support.invoked import invoke
from tests.support.one_rank import OneRank
from tests.support.pictured import pictured_run
from tools.trace import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(own_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured_run(own_data, tmp_path_factory.mktemp("traced"), model__mixture_of_depths=None)


def test_the_counts_are_those_of_an_evaluation(run: Path) -> None:
    invoke(main, run, "--sequences", 3, code=0)
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
    assert np.array_equal(found.choices(), heldout.counts.choices_LC)
    assert np.array_equal(found.tokens["token"], np.concatenate([b.tokens_BS[~b.padding_BS].numpy() for b in batches]))
    label_T, modality_T = (
        np.concatenate([getattr(b, name)[~b.padding_BS].numpy() for b in batches])
        for name in ("labels_BS", "label_modality_BS")
    )
    assert np.array_equal(np.isnan(found.losses), label_T == IGNORED)
    for m, name in enumerate(trained.manifest.modalities):  # losses are float16, with 11 bits
        of_modality = found.losses[(label_T != IGNORED) & (modality_T == m)].astype(np.float64)
        assert of_modality.mean() == pytest.approx(heldout.loss[name], rel=2e-3)
    assert len(np.unique(found.tokens["sequence"])) == sum(int((~b.padding_BS).any(1).sum()) for b in batches)
    assert (found.manifest.split, found.manifest.rank_of_expert) == ("held-out", (0, 0, 0, 0))
    again = invoke(main, run, code=78)
    assert "step_2: it exists, and a trace is never overwritten" in again.stderr


def spread(one: OneRank) -> None:
    """Gives routers large rows, and thresholds that refuse about half of the tokens, so that choices differ between
    tokens."""
    for number, layer in enumerate(one.training.parallel.model.moe_modules()):
        for parameter in layer.router.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
        for name, buffer in layer.router.named_buffers():
            if name.endswith("threshold"):
                buffer.fill_(0.5)


ROUTERS: dict[str, dict[str, Any]] = {
    "expert_threshold": {"warmup_steps": 1},
    "top_p": {},
    "expert_choice": {"causal": "threshold"},
    "relu": {},
    "threshold": {},
    "predicted_k": {},
}


@pytest.mark.parametrize("kind", rest_full(ROUTERS, keep=2))
def test_each_token_has_its_own_number_of_experts(own_data: Path, tmp_path: Path, kind: str) -> None:
    """For each token, ids and weights in the trace equal the (token, expert) pairs that the router gives to dispatch."""
    choosing = kind.startswith("expert")
    group = {"num_experts": 4, "num_null": 0 if choosing else 1, "top_k": 1 if choosing else 3, "ffn_dim": 8}
    changes: dict[str, Any] = {
        "model__mixture_of_depths": None,
        "model__moe__router": {"kind": kind, **ROUTERS[kind]},
        "model__moe__groups": {"text": group, "image": {**group, "num_experts": 2}},
    }
    if choosing:
        changes |= {"loss__balance__schedule": [[0, 0.0]], "loss__z": 0.0}
    run = pictured_run(own_data, tmp_path, begin=spread, **changes)
    invoke(main, run, "--sequences", 3, code=0)
    found = read_trace(run / "traces" / "step_2").step(2)
    trained = find_trained(run)
    model = trained.load(torch.device("cpu"))
    pairs_L: list[list[Assignments]] = []
    for layer in model.moe_modules():
        pairs_L.append([])
        layer.router.register_forward_hook(lambda *call, seen=pairs_L[-1]: seen.append(call[-1].assignments))
    weights_TLE = []
    for source in trained.manifest.sources:
        shape: dict[str, Any] = {"seq_len": 96, "sequences": 3, "micro_batch": 2, "rank": 0, "world_size": 1}
        for batch in heldout_batches(trained.config.data.path, trained.manifest, source=source, **shape):
            with torch.no_grad():
                forward(model, batch, torch.tensor(trained.group_of_modality))
            real_T = ~batch.padding_BS.flatten()
            weights_TLE.append(torch.stack([table(seen.pop(), len(real_T))[real_T] for seen in pairs_L], dim=1))
    wanted_TLE = torch.cat(weights_TLE).to(torch.float16).numpy()
    assert found.ids.shape == found.weights.shape == (*wanted_TLE.shape[:2], 4 if choosing else 3)
    traced_TLE, (token, layer, place) = np.full_like(wanted_TLE, np.nan), ((found.ids >= 0) & (found.ids < 6)).nonzero()
    traced_TLE[token, layer, found.ids[token, layer, place]] = found.weights[token, layer, place]
    np.testing.assert_array_equal(traced_TLE, wanted_TLE)
    assert not found.weights[(found.ids < 0) | (found.ids >= 6)].any()
    assert (np.diff(np.where(found.ids < 0, -1.0, found.weights), axis=2) <= 0).all() or not choosing, "the best first"
    numbers = np.unique((~np.isnan(wanted_TLE)).sum(2))
    assert len(numbers) > 2, numbers
    assert numbers[0] == 0 or kind == "top_p", "some token has no true expert"
    assert not choosing or numbers[-1] > group["top_k"]


def table(pairs: Assignments, num_tokens: int) -> torch.Tensor:
    """Returns the weight of each token's true experts [T, 6], or nan where the expert does not take the token."""
    weight_TE, taken = torch.full((num_tokens, 6), torch.nan), pairs.taken()
    weight_TE[taken.token_N, taken.expert_N] = taken.weight_N
    return weight_TE


def test_an_unwritable_folder_is_refused(run: Path) -> None:
    done = invoke(main, run, "--out", "/dev/null/x/y")
    assert (done.exit_code, "--out /dev/null/x/y: not writable" in done.stderr) == (78, True), done.output


def test_a_trace_that_could_not_be_written_is_no_success(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_dist.monitor.trace.writer.content_check", lambda *_: 1 / 0)
    done = invoke(main, run, "--sequences", 1, "--out", tmp_path / "broken", code=1)
    assert "broken/heldout: the trace is incomplete" in done.stderr


def test_a_model_whose_choices_do_not_fit_is_refused(own_run: Path) -> None:
    assert "model.mixture_of_depths: needs the choices of all tokens" in invoke(main, own_run, code=78).stderr
