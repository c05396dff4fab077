"""Tools use a run of adapters together with its base, and refuse it without its base."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.config.tuning_schema import RouterTuningSection
from moe_dist.errors import ConfigError
from moe_dist.formats.split_files import data_digest
from moe_dist.inference.loaded_run import find_trained
from moe_dist.train.start import resume
from moe_dist.train.start.resume import kept_position
from tests.support.cover import full
from tests.support.imported import logits_of
from tests.support.invoked import invoke
from tests.support.messages import refused
from tests.support.one_rank import OneRank, world_of_one
from tests.support.pictured import VOCAB, pictured_data
from tests.support.tiny_embedder import tiny_embedder
from tools import evaluate, generate, prepare_router_tuning, verify_checkpoint

DENSE = {"all": {"num_experts": 1, "top_k": 1, "ffn_dim": 16, "modalities": ["text", "image"]}}
SIZES: dict[str, Any] = {"model__vocab_size": VOCAB, "model__max_seq_len": 192, "data__seq_len": 96}
ADAPTED: dict[str, Any] = {
    **SIZES,
    "model__moe__groups": {"all": {**DENSE["all"], "num_experts": 3, "num_null": 1}},
    "model__moe__experts": {"kind": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.1},
    "model__moe__router": {"normalise": "none"},
    "model__attention_lora": {"rank": 2, "alpha": 4.0},
    "train__only": "adapters",
    "run__init_rules": ["adapt"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OneRank]:
    """The folder of a run of adapters, and the run in memory. The folder of its base is beside it. Tests must not
    change the run."""
    data, root = pictured_data(tmp_path_factory.mktemp("own")), tmp_path_factory.mktemp("runs")
    with world_of_one():
        OneRank(data, root, run__name="base", model__moe__groups=DENSE, **SIZES).train_and_save()
        run = OneRank(data, root, run__name="adapted", run__init_from=str(root / "base"), **ADAPTED)
        run.train_and_save()
    return run.folder.parent, run


def test_base_and_adapters_come_back_together(trained: tuple[Path, OneRank]) -> None:
    folder, run = trained
    model = find_trained(folder).load(torch.device("cpu"))
    tokens = torch.arange(40).view(2, 20)
    expected = run.training.parallel.model.eval()
    assert torch.equal(logits_of(model, tokens)[0], logits_of(expected, tokens)[0])
    base = find_trained(folder.parent / "base").load(torch.device("cpu"))
    assert not torch.allclose(logits_of(model, tokens)[0], logits_of(base, tokens)[0])


def test_without_its_base_it_is_refused(trained: tuple[Path, OneRank]) -> None:
    folder, _ = trained
    base, away = folder.parent / "base", folder.parent / "away"
    base.rename(away)
    try:
        for tool, options in ((verify_checkpoint, ()), (generate, ("--prompt", "a"))):
            done = invoke(tool.main, folder, *options, code=65)
            assert "is missing; restore it" in done.stderr
            assert str(base) in done.stderr.replace("\n", "")
    finally:
        away.rename(base)


def test_adapters_are_no_start_of_another_run_and_no_run_to_tune(trained: tuple[Path, OneRank], tmp_path: Path) -> None:
    folder, _ = trained
    data = Path(find_trained(folder).config.data.path)
    with world_of_one():
        other = OneRank(data, tmp_path, run__name="other", run__init_from=str(folder), model__moe__groups=DENSE, **SIZES)
        with refused(ConfigError):
            other.resumable.restore()
    embedder = tiny_embedder(tmp_path / "embedder")
    done = invoke(
        prepare_router_tuning.main, folder, "--tasks", "pictures", "--out", tmp_path / "out", "--embedder", embedder
    )
    assert done.exit_code == 78
    assert "take a run without adapters" in done.stderr


def test_a_place_among_samples_of_router_tuning_is_none_in_the_data(
    trained: tuple[Path, OneRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_trained(trained[0].parent / "base")
    digest = data_digest(found.config.data.path, found.manifest)
    assert kept_position(found.folder, found.config, digest) == 16
    tuned = found.config.model_copy(update={"router_tuning": RouterTuningSection(data="x")})
    monkeypatch.setattr(resume, "saved_config", lambda values, folder: tuned)
    with refused(ConfigError, "run.keep_position"):
        kept_position(found.folder, found.config, digest)


@pytest.mark.parametrize("shared", [False, full(True)])
def test_adapters_on_experts_are_resumed_sampled_and_evaluated(
    trained: tuple[Path, OneRank], tmp_path: Path, shared: bool
) -> None:
    data = Path(find_trained(trained[0]).config.data.path)
    mixture = {"model__moe__groups": {"all": {**DENSE["all"], "num_experts": 3, "top_k": 2}}, **SIZES}
    experts = {"kind": "ffn_lora", "rank": 2, "alpha": 4.0, "shared": shared}
    only = {"model__moe__experts": experts, "train__only": "adapters", "run__init_rules": ["adapt"]}
    adapted = {**mixture, **only, "run__name": "adapted", "run__init_from": str(tmp_path / "base")}
    with world_of_one():
        OneRank(data, tmp_path, run__name="base", **mixture).train_and_save()
        run = OneRank(data, tmp_path, **adapted)
        progress = run.train_and_save()
        again = OneRank(data, tmp_path, **adapted)
        assert again.resumable.restore() == progress
    assert torch.equal(again.weights(), run.weights())
    assert torch.equal(again.moments(), run.moments())
    folder, tokens = run.folder.parent, torch.arange(40).view(2, 20)
    model = find_trained(folder).load(torch.device("cpu"))
    expected = logits_of(run.training.parallel.model.eval(), tokens)[0]
    assert torch.equal(logits_of(model, tokens)[0], expected)
    base = find_trained(tmp_path / "base").load(torch.device("cpu"))
    assert not torch.allclose(logits_of(base, tokens)[0], expected)
    invoke(generate.main, folder, "--prompt", "text 1", "--tokens", 5, code=0)
    invoke(
        evaluate.main, folder, "--tasks", "pictures", "--split", "train", "--limit", 4, "--out", tmp_path / "out", code=0
    )
    invoke(verify_checkpoint.main, folder, code=0)
