"""Tests router tuning on choices: the rows, labels and losses of samples, and damaged samples."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe_dist.data.batch import IGNORED
from moe_dist.errors import DataError
from moe_dist.formats.tuning_manifest import load_tuning_manifest
from moe_dist.train.objective.loss import forward, labels_by_modality
from moe_dist.train.router_tuning.loader import ChoiceBatch, ChoiceMaker, SampleLoader, SampleMaker
from moe_dist.train.router_tuning.samples import Samples, TuningSample
from tests.reference.choices import choice_loss_reference
from tests.support.messages import refused
from tests.support.tuned import MANIFEST
from tests.support.tuning_samples import made_samples
from tests.unit.train.router_tuning.test_tuning import GROUPS, make_model


def sample(prompt: list[int], answer: list[int], choices: list[int]) -> TuningSample:
    return TuningSample(np.array(prompt), np.array(answer), np.array(choices))


def batch_of(folder: Path) -> ChoiceBatch:
    loader = SampleLoader(
        Samples(folder), ChoiceMaker(MANIFEST), seed=0, global_batch=20, micro_batch=20, rank=0, world_size=1
    )
    (batch,) = loader.batches(0)
    return batch


def test_a_row_is_a_prompt_and_its_label_the_answers_first_token() -> None:
    samples = [sample([1, 2, 3], [4, 5], [4, 9, 100]), sample([6], [100], [-1, -1, -1])]
    batch = ChoiceMaker(MANIFEST).make(samples, [7, 9])
    no = IGNORED
    assert batch.tokens_BS.tolist() == [[1, 2, 3], [6, 0, 0]]
    assert batch.labels_BS.tolist() == [[no, no, 4], [no, no, no]], "no token tells the second one's choices apart"
    assert batch.label_modality_BS.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert batch.probe_tokens_B.tolist() == [2, 3]
    moved = batch.to("cpu")
    assert moved.choices().tolist() == [[4, 9, 100], [-1, -1, -1]]
    assert moved.numbers == (7, 9)
    assert SampleMaker(MANIFEST).make(samples).to("cpu").choices() is None
    assert ChoiceMaker(MANIFEST).make([]).choices().tolist() == [[-1]]  # pyright: ignore[reportOptionalMemberAccess]
    with refused(DataError, "token id 192"):
        ChoiceMaker(MANIFEST).make([sample([1], [2], [2, 192])])


def test_losses_are_those_of_each_prompt_alone(folder: Path) -> None:
    samples, batch, model = Samples(folder), batch_of(folder), make_model(0, 1)
    losses_BS, _ = forward(model, batch.to("cpu"), GROUPS, losses=True)
    hidden = []
    model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    untold = 0
    for row, number in enumerate(batch.numbers):
        each = samples.sample(number)
        forward(model, SampleMaker(MANIFEST).make([TuningSample(each.prompt, each.answer[:1])]), GROUPS)
        choices = [choice for choice in each.choices.tolist() if choice >= 0]
        wanted = choice_loss_reference(hidden.pop()[0, -1], model.output.weight, choices) if choices else 0.0
        assert losses_BS[row].sum().item() == pytest.approx(float(wanted), rel=1e-12)
        assert (losses_BS[row] != 0.0).sum() == bool(choices)
        untold += not choices
    assert untold == 2
    assert labels_by_modality(batch.labels_BS, batch.label_modality_BS, 2).sum() == 18


def test_choices_come_back_and_older_folders_have_none(folder: Path, tmp_path: Path) -> None:
    manifest = load_tuning_manifest(folder)
    assert (manifest.choices, manifest.told) == (4, 18)
    older = made_samples(tmp_path / "older", ids=(0, 192), layers=(0, 1), columns=13, model={}, longest=8, choices=False)
    assert not (older / "choices.npy").exists()
    values = json.loads((older / "manifest.json").read_text())
    del values["choices"], values["told"]  # as in a manifest of an earlier version
    (older / "manifest.json").write_text(json.dumps(values))
    found, new = Samples(older), Samples(folder)
    for number in range(20):
        ours, theirs = found.sample(number), new.sample(number)
        assert (ours.prompt.tolist(), ours.answer.tolist()) == (theirs.prompt.tolist(), theirs.answer.tolist())
        assert len(ours.choices) == 0
        assert theirs.choices[0] in (-1, theirs.answer[0])


def test_choices_that_do_not_begin_with_the_answer_are_damage(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    path = broken / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "told": 17}))
    with refused(DataError, "choices.npy must have 17 rows"):
        Samples(broken)
