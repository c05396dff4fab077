"""Each part of a folder of router-tuning samples contains all smaller parts."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe_dist.errors import ConfigError, DataError
from moe_dist.train.router_tuning.samples import Samples
from research.experiments.subsets import _dealt, make_subsets
from tests.support.messages import refused
from tests.support.tuning_samples import made_samples


def ids_of(folder: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "questions.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made_samples(tmp_path / "samples", ids=(10, 40), layers=(0, 1), columns=4, model={})


def test_parts_hold_their_samples_unchanged_and_lie_in_each_other(folder: Path) -> None:
    found = make_subsets(folder, (5, 12))
    whole, places = Samples(folder), {name: place for place, name in enumerate(ids_of(folder))}
    for size in (5, 12):
        path = Path(found[str(size)]["folder"])
        part, names = Samples(path), ids_of(path)
        assert (path.name, found[str(size)]["samples"]) == (f"samples-{size}", size)
        assert (
            found[str(size)]["right"] == part.manifest.right == sum(places[name] < whole.manifest.right for name in names)
        )
        for number, name in enumerate(names):
            one, other = part.sample(number), whole.sample(places[name])
            assert all(np.array_equal(getattr(one, key), getattr(other, key)) for key in ("prompt", "answer", "choices"))
            assert np.array_equal(part.embeddings_SE[number], whole.embeddings_SE[places[name]])
            assert np.array_equal(part.routing_SLC[number], whole.routing_SLC[places[name]])
    small, large = (set(ids_of(Path(found[size]["folder"]))) for size in ("5", "12"))
    assert small < large


def test_parts_are_kept_and_those_of_other_samples_refused(folder: Path) -> None:
    made = make_subsets(folder, (5,))
    before = (Path(made["5"]["folder"]) / "manifest.json").read_bytes()
    assert make_subsets(folder, (5,)) == made
    assert (Path(made["5"]["folder"]) / "manifest.json").read_bytes() == before
    made_samples(
        folder.with_name("samples-6"), ids=(10, 40), layers=(0, 1), columns=4, model={}, count=6, checkpoint="1" * 64
    )
    with refused(DataError):
        make_subsets(folder, (6,))
    with refused(ConfigError, "measure.questions.sizes"):
        make_subsets(folder, (21,))


def test_samples_without_a_label_are_left_out_if_asked(folder: Path) -> None:
    told = Samples(folder).manifest.told
    assert told < 20
    part = Samples(make_subsets(folder, (told,), labelled=True)[str(told)]["folder"])
    assert part.manifest.told == len(part) == told
    with pytest.raises(ConfigError, match=f"has {told} samples with a first token of their own"):
        make_subsets(folder, (told + 1,), labelled=True)


def test_every_beginning_has_each_task_equally_often_whatever_was_answered() -> None:
    questions = [{"task": f"task{n % 3}", "id": str(n), "right": n < 10} for n in range(30)]
    order = _dealt(questions)
    assert sorted(order) == list(range(30))
    for size in (3, 9, 30):
        assert {order[:size].count(n) for n in order[:size]} == {1}
        assert [sum(questions[n]["task"] == f"task{task}" for n in order[:size]) for task in range(3)] == [size // 3] * 3
    other = [{**each, "right": not each["right"]} for each in reversed(questions)]
    assert [questions[n]["id"] for n in order] == [other[n]["id"] for n in _dealt(other)]
