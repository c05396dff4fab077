"""`teach` writes a teacher's most likely words to a file. Another run's file is refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import load_manifest
from moe_dist.formats.split_files import data_digest
from moe_dist.model.objective import divergences
from moe_dist.train.build.training import build_distillation, build_loader
from moe_dist.train.objective.top_logits import TopLogits
from tests.support.invoked import invoke
from tests.support.messages import refused
from tests.support.served import saved_model
from tests.support.tiny import tiny_config, tiny_dataset
from tools.teach import main

TOP, VOCABULARY = 63, 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with data, a teacher, and the teacher's most likely words for the 4 steps of `tiny_config`."""
    root = tmp_path_factory.mktemp("taught")
    tiny_dataset(root / "data")
    saved_model(root / "teacher", root / "data", {})
    (root / "run.yaml").write_text(json.dumps(config(root).model_dump(mode="json")))
    done = invoke(main, root / "run.yaml", "--out", root / "words", "--top", TOP, "--device", "cpu", code=0)
    assert f"32 sequences x 64 positions x {TOP} words" in done.output
    return root


def config(root: Path, **changes: Any) -> Config:
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    alone = {"parallel.ep": 1, "placement.policy": "interleaved"}
    return tiny_config(root / "data", root, {**alone, "loss.distillation": {"teacher": str(root / "teacher")}, **changes})


def reader(root: Path, folder: Path | None = None, **changes: Any) -> TopLogits:
    digest = data_digest(root / "data", load_manifest(root / "data"))
    return TopLogits(str(folder or root / "words"), config(root, **changes), digest)


def test_it_says_what_the_teacher_says_in_any_layout(made: Path) -> None:
    """If the file has all words but one, the KL equals the KL from all words. The second of two ranks finds its rows,
    although its micro-batches differ from those of the teacher's run."""
    manifest, cpu = load_manifest(made / "data"), torch.device("cpu")
    teacher, stored = build_distillation(config(made), manifest, cpu).outputs, reader(made)
    batches = build_loader(config(made, train__micro_batch=1), manifest, rank=1, world_size=2).batches(8)
    assert len(batches) == 4
    for batch in batches:
        whole, part = teacher(batch), stored(batch)
        assert part.word_BSK is not None
        torch.testing.assert_close(part.log_prob_BSK, whole.log_prob_BSK.topk(TOP).values)
        logits = torch.randn(*batch.tokens_BS.shape, VOCABULARY)
        torch.testing.assert_close(
            divergences(logits, part, batch.labels_BS), divergences(logits, whole, batch.labels_BS), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data__seq_len": 32}, "its seq_len is 64, the run's is 32; take that"),
        ({"run__seed": 1}, "its seed is 0, the run's is 1"),
        ({"train__steps": 5}, "has 32 sequences; train.steps=5 x train.global_batch=8 needs 40"),
        ({"model__vocab_size": 80}, "the teacher's vocab_size=64, model.vocab_size=80"),
    ],
)
def test_the_file_of_another_run_is_refused(made: Path, changes: dict[str, Any], text: str) -> None:
    with refused(ConfigError, "loss.distillation.top_logits", golden=False) as raised:
        reader(made, **changes)
    assert text in str(raised.value)


def test_other_data_and_damage_are_refused(made: Path, tmp_path: Path) -> None:
    tiny_dataset(tmp_path / "data", seed=1)
    digest = data_digest(tmp_path / "data", load_manifest(tmp_path / "data"))
    with pytest.raises(ConfigError, match=r"captions_train.bin.* is another file than it was"):
        TopLogits(str(made / "words"), config(made), digest)
    with pytest.raises(ConfigError, match=r"no manifest.json there; make it with `moe-dist teach`"):
        reader(made, tmp_path)
    (tmp_path / "manifest.json").write_text((made / "words" / "manifest.json").read_text())
    for name in ("keys", "words"):
        np.save(tmp_path / f"{name}.npy", np.load(made / "words" / f"{name}.npy"))
    with pytest.raises(DataError, match=r"damaged: .*log_probs.npy"):
        reader(made, tmp_path)
    os.mkfifo(tmp_path / "log_probs.npy")
    with pytest.raises(DataError, match=r"damaged: .*is no regular file"):
        reader(made, tmp_path)
    (tmp_path / "log_probs.npy").unlink()
    np.save(tmp_path / "log_probs.npy", np.zeros((3, 64, TOP), np.float32))
    with pytest.raises(DataError, match="an array has another shape than"):
        reader(made, tmp_path)
    later = build_loader(config(made), load_manifest(made / "data"), rank=0, world_size=1).batches(64)
    with pytest.raises(DataError, match="lacks a sequence of this step"):
        [reader(made)(batch) for batch in later]


def test_what_teach_cannot_do_is_refused(made: Path) -> None:
    for words, text in (
        (["--top", "8"], "exists; nothing is overwritten"),
        (["--top", "64"], "--top 64: must be below model.vocab_size=64"),
        (["loss.distillation=null"], "there is no teacher to run"),
    ):
        assert text in invoke(main, made / "run.yaml", *words, "--out", made / "words", "--device", "cpu", code=78).output
    with pytest.raises(ValueError, match="give one of the two, and only one"):
        config(made, loss__distillation={})
    with pytest.raises(ValueError, match="set teacher in place of top_logits, or divergence to forward"):
        config(made, loss__distillation={"top_logits": str(made / "words"), "divergence": "reverse"})
