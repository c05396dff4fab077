"""Random damage is found before training starts, and the error describes it. The tests print the seed of the damage."""

import os
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from moe_dist.checkpoint import manager, storage
from moe_dist.checkpoint.contents import Contents, examine
from moe_dist.checkpoint.index import shard_file
from moe_dist.checkpoint.shard_header import ShardHeader
from moe_dist.checkpoint.state import CheckpointState, RankLayout, capture
from moe_dist.checkpoint.verify import verify
from moe_dist.errors import DataError, MoeDistError
from moe_dist.formats.manifest import load_manifest
from moe_dist.formats.split_files import data_digest, digest_problems
from moe_dist.plan.preflight import data_set_problems
from tests.support.damage import KINDS, damage
from tests.support.fake_ranks import load_all, save_all
from tests.support.small_run import SmallRun
from tests.support.special_files import SPECIAL, reads_little
from tests.support.tiny import tiny_dataset

SEED = 20_260_726
CHECKPOINTS, DATA_SETS = 400, 100
RANKS = 3


class Replica(SmallRun):
    """One of three ranks of the small run. All three have equal tensors."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder)
        self.rank = rank

    def state(self, **values: object) -> CheckpointState:
        layout = RankLayout(super().state().layout.placement, rank=self.rank, world_size=RANKS)
        rank_values = {"generators": {"torch": f"{self.rank:02x}"}}
        return capture(self.model, self.optimizer, layout, values=values, rank_values=rank_values)  # type: ignore[arg-type]


def states(folder: Path, steps: int, **values: object) -> list[CheckpointState]:
    return [Replica(folder, rank).train(steps).state(**values) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints (steps 3 and 4) of one run of three ranks."""
    folder = tmp_path_factory.mktemp("good")
    for step in (3, 4):
        save_all(states(folder, step, progress={"position": 8 * step}, config={"a": [1.5, None]}), folder, step)
    return folder


FILES = ["index.json", "state.json", "SHA256SUMS", *(shard_file(number) for number in range(RANKS))]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", FILES)
def test_a_special_file_is_refused_by_name_within_a_second(good: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = shutil.copytree(good / "step_4", tmp_path / "step_4")
    (folder / name).unlink()
    SPECIAL[kind](folder / name)
    with reads_little():
        found = verify(folder)[1]
    assert any(problem.file == name and "is no regular file" in problem.detail for problem in found), found
    with reads_little(), pytest.raises(DataError, match=name):
        load_all(states(good, 1), folder)


def test_each_header_is_read_once_inside_the_vote(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a rank read a header again after the ranks have voted, a disk error would end that rank alone, and the other
    ranks would hang."""
    read: Counter[int] = Counter()
    real = manager.open_shard

    def failing_later(contents: Contents, number: int) -> ShardHeader:
        read[number] += 1
        if read[number] > 1:
            raise DataError(f"shard {number}: cannot be read")
        return real(contents, number)

    monkeypatch.setattr(manager, "open_shard", failing_later)
    restored = load_all(states(tmp_path, 1), good / "step_4")
    assert [each.rank_values["generators"] for each in restored] == [{"torch": f"{rank:02x}"} for rank in range(RANKS)]
    assert read == dict.fromkeys(range(RANKS), 1)


def test_wrongly_assembled_tensors_are_found(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that swaps two tensors of equal shape (a bug that other projects had) is detected."""
    real = manager.read_tensors

    def wrong(contents: Contents, tensors: Mapping[str, torch.Tensor]) -> None:
        real(contents, tensors)
        one, other = (tensors[f"optimizer.{moment}.0.weight"] for moment in ("exp_avg", "exp_avg_sq"))
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)

    monkeypatch.setattr(manager, "read_tensors", wrong)
    with pytest.raises(DataError, match="loaded tensors differ from the saved ones"):
        load_all(states(tmp_path, 1), good / "step_4")


@pytest.mark.full
def test_damaged_checkpoints_are_found(good: Path, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    kinds: Counter[str] = Counter()
    model = states(tmp_path, 1)
    for number in range(CHECKPOINTS):
        draw = random.Random(SEED + number)
        folder = tmp_path / "step_4"
        shutil.copytree(good / "step_4", folder)
        done = damage(folder, FILES, draw, other=good / "step_3")
        kinds[done.kind] += 1
        with pytest.raises(MoeDistError) as raised:
            load_all(model, folder)
        assert isinstance(raised.value, DataError), (number, done, raised.value)
        _, problems = verify(folder)
        assert problems, (number, done)
        assert any(done.file in str(problem) for problem in problems), (number, done, problems)
        shutil.rmtree(folder)
    assert set(kinds) == set(KINDS)


def test_damaged_data_sets_are_found_on_resume(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    good, other, folder = tmp_path / "good", tmp_path / "other", tmp_path / "copy"
    tiny_dataset(good, documents=24)
    tiny_dataset(other, seed=1, documents=24)
    saved = data_digest(good, load_manifest(good))
    files = ["manifest.json", *(f"{source}_train.{end}" for source in ("captions", "prose") for end in ("idx", "bin"))]
    for number in range(DATA_SETS):
        draw = random.Random(SEED + number)
        shutil.copytree(good, folder)
        done = damage(folder, files, draw, other=other)
        try:
            manifest = load_manifest(folder)
            found = data_set_problems(folder, manifest) or digest_problems(saved, data_digest(folder, manifest))
        except MoeDistError as error:
            found = list(error.problems)
        assert found, (number, done)
        shutil.rmtree(folder)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def kinds_of(folder: Path) -> set[tuple[str, str]]:
    return {(problem.kind, problem.file) for problem in verify(folder)[1]}


def test_kinds_of_damage_are_distinguished(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_4"

    def fresh() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good / "step_4", folder)
        return folder / shard_file(1)

    shard = fresh()
    os.truncate(shard, shard.stat().st_size - 1)
    assert kinds_of(folder) == {("truncated", shard.name)}
    assert "lost: " in str(verify(folder)[1][0])
    shard = fresh()
    flip(shard, -1)
    (problem,) = verify(folder)[1]
    assert (problem.kind, problem.file) == ("damaged", shard.name)
    header = examine(folder).headers[1]
    assert problem.tensor == max(header.ends, key=lambda name: header.ends[name])
    shard = fresh()
    shutil.copy(good / "step_3" / shard.name, shard)
    assert kinds_of(folder) == {("mixed up", shard.name)}
    assert "at step 3" in str(verify(folder)[1][0])
    fresh()
    shutil.copy(good / "step_3" / "state.json", folder)
    assert kinds_of(folder) == {("mixed up", "state.json")}
    with pytest.raises(DataError, match=r"state\.json"):
        load_all(states(tmp_path, 1), folder)
    shard = fresh()
    wider = SmallRun(tmp_path / "wider", width=9)
    shutil.copy(wider.save(4) / shard_file(0), shard)
    wider_kinds = kinds_of(folder)
    assert wider_kinds <= {("mixed up", shard.name), ("foreign", shard.name)}
    assert wider_kinds
    shard = fresh()
    torch.save({"w": torch.ones(2)}, shard)
    assert kinds_of(folder) == {("foreign", shard.name)}
    shard = fresh()
    shard.unlink()
    assert kinds_of(folder) == {("missing", shard.name)}
    shutil.rmtree(folder)
    shutil.copytree(good / "step_3", folder)
    assert kinds_of(folder) == {("mixed up", "index.json")}
    assert "is of step 3, but its folder is named step_4" in str(verify(folder)[1][0])
    fresh()
    shutil.copy(folder / shard_file(0), folder / shard_file(7))
    assert kinds_of(folder) == {("foreign", shard_file(7))}


def test_non_finite_values_are_reported_as_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "check_finite", lambda _: None)  # earlier versions saved without this check
    run = SmallRun(tmp_path).train(1)
    with torch.no_grad():
        run.model[0].bias[2] = float("nan")
    (problem,) = verify(run.save(1))[1]
    assert (problem.kind, problem.tensor) == ("not finite", "0.bias")


class Payload:
    """Unpickling this object creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.system, (f"touch {self.target}",)


PLACES = [*FILES, ".metadata", "__0_0.distcp", "optimizer.pt", "adapter_model.bin", "rng_state_0.pth"]


@pytest.mark.parametrize("place", PLACES)
def test_planted_pickles_run_nothing(good: Path, tmp_path: Path, place: str) -> None:
    target, folder = tmp_path / "ran", tmp_path / "step_4"
    pickled = pickle.dumps(Payload(target))
    pickle.loads(pickled)
    assert target.exists(), "the payload itself must work"
    target.unlink()
    shutil.copytree(good / "step_4", folder)
    torch.save(Payload(target), tmp_path / "saved")
    for content in (pickled, (tmp_path / "saved").read_bytes()):
        (folder / place).write_bytes(content)
        if place in FILES:
            with pytest.raises(DataError):
                load_all(states(tmp_path, 1), folder)
            assert verify(folder)[1]
        else:  # the file is not part of the checkpoint, and is not read
            assert load_all(states(tmp_path, 1), folder)[0].step == 4
            assert verify(folder)[1] == []
    assert not target.exists()
