"""Questions as training data: on the right side, without those that are left to router tuning, answered rightly; and asked
of a model as the experiment roma asks."""

from pathlib import Path

import pytest
import torch

from moe_dist.config.manifest import Manifest, load_manifest
from moe_dist.data.indexed import IndexedSplit
from moe_dist.errors import ConfigError
from moe_dist.evaluation.multiple_choice import Prompts, results
from moe_dist.evaluation.questions import reasoning
from moe_dist.evaluation.questions.catalogue import Catalogue
from moe_dist.evaluation.questions.split import Side
from moe_dist.generation.material import Material
from moe_dist.trained import find_trained
from tests.support.pictured import pictured_run
from tests.support.wordnet_files import write_wordnet
from tools.evaluate import ask, write
from tools.reproduction import question_data
from tools.reproduction.asking import Asking
from tools.reproduction.study import QuestionsSection

SIZE, LEFT = 80, 6


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough nouns that each side has hypernyms."""
    opposites = [(f"big{number}", f"small{number}") for number in range(300)]
    return write_wordnet(tmp_path_factory.mktemp("dict"), [[f"noun{number}"] for number in range(600)], opposites)


@pytest.fixture(scope="module")
def made(own_data: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "questions"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reasoning, "SIZE", SIZE)
        patch.setattr(question_data, "SIZE", SIZE)
        question_data.make(own_data, out, wordnet=words, left=LEFT, seeds=2, seed=0)
    return out


def catalogue_of(folder: Path, words: Path) -> tuple[Manifest, Material, Catalogue]:
    manifest = load_manifest(folder)
    material = Material(folder, manifest, vocab_size=manifest.vocab_size)
    return manifest, material, Catalogue(material, tuple(manifest.sources), words)


def documents(folder: Path, manifest: Manifest, source: str, side: str) -> dict[str, str]:
    """Answers by prompt."""
    tokenizer = Material(folder, manifest, vocab_size=manifest.vocab_size).tokenizer
    split = getattr(manifest.sources[source], side)
    data, found = IndexedSplit(folder, split), {}
    for start, length in zip(data.starts_D.tolist(), data.lengths_D.tolist(), strict=True):
        tokens, prompt = data.tokens(start, length), data.prompt(start, length)
        assert tokens[-1] == manifest.eos_id
        read, learned = (tokenizer.decode(part.tolist()) for part in (tokens[prompt], tokens[~prompt][:-1]))
        found[read] = learned
    return found


def test_documents_are_answered_training_questions_that_are_not_left_to_router_tuning(
    made: Path, own_data: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reasoning, "SIZE", SIZE)
    manifest, material, catalogue = catalogue_of(made, words)
    prompts = Prompts(material, listed=False)
    assert set(manifest.sources) == {*load_manifest(own_data).sources, "wordnet", "reasoning"}
    for source, tasks in question_data.TASKS.items():
        train, valid = (documents(made, manifest, source, side) for side in ("train", "valid"))
        assert train
        assert valid
        for task in tasks:
            for side in Side:
                for place, question in enumerate(catalogue.questions(task, side, limit=None)):
                    right = prompts(question)[question.answer]
                    asked, answer = (material.tokenizer.decode(list(part)) for part in right)
                    if side is Side.TRAIN and place >= LEFT and source == "wordnet":
                        assert train[asked] == answer
                    elif side is Side.VALID:
                        assert valid[asked] == answer
                    if side is not Side.TRAIN or place < LEFT:
                        assert asked not in train


def test_further_seeds_have_other_questions(made: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning, "SIZE", SIZE)
    manifest, _, catalogue = catalogue_of(made, words)
    own = len(catalogue.questions("reasoning-products", Side.TRAIN, limit=None))
    mine = [asked for asked in documents(made, manifest, "reasoning", "train") if "multipl" in asked or "*" in asked]
    assert len(mine) > 1.5 * own, "two seeds, about as many questions each as that of the evaluation"


def test_nothing_is_overwritten(made: Path, own_data: Path, words: Path) -> None:
    with pytest.raises(ConfigError, match="is there already"):
        question_data.make(own_data, made, wordnet=words, left=LEFT, seeds=2, seed=0)


@pytest.mark.parametrize("side", [Side.VALID, Side.TEST])
def test_a_run_is_asked_as_the_evaluation_asks(own_data: Path, words: Path, tmp_path: Path, side: Side) -> None:
    groups = {"all": {"num_experts": 4, "top_k": 2, "ffn_dim": 8, "modalities": ["text", "image"]}}
    trained = find_trained(pictured_run(own_data, tmp_path, max_seq_len=192, model__depths=None, model__moe__groups=groups))
    section = QuestionsSection(tasks=("wordnet-definition", "wordnet-category"), limit=12, wordnet=str(words))
    model = trained.load(torch.device("cpu"))
    asking = Asking(
        model,
        trained.config,
        trained.manifest,
        group_of_modality=torch.tensor(trained.group_of_modality),
        section=section,
        side=side,
    )
    found = asking.record()
    _, material, catalogue = catalogue_of(own_data, words)
    likelihood, answered = trained.likelihood(torch.device("cpu")), {}
    for task in section.tasks:
        questions = catalogue.questions(task, side, limit=12)
        written = write(questions, Prompts(material, listed=False), rotations=False, max_seq_len=192)
        answered[task] = ask(questions, written, likelihood)
    expected = results(answered, seed=0)
    assert found["accuracy"] == expected["mean"]["normalised"]["accuracy"]  # pyright: ignore[reportIndexIssue]
    assert {name: each["right"] for name, each in found["by_task"].items()} == {
        name: each["normalised"]["right"]  # pyright: ignore[reportIndexIssue]
        for name, each in expected["tasks"].items()  # pyright: ignore[reportAttributeAccessIssue]
    }
    assert found["side"] == side
    assert set(asking.oracle()["by_task"]) == set(section.tasks)
