"""Training questions are on the training side, have right answers, and are no questions of router tuning. A run's
model answers them as in an evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.data.indexed import IndexedSplit
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import Manifest, load_manifest
from moe_dist.inference.loaded_run import find_trained
from moe_dist.inference.multiple_choice import Prompts, results
from moe_dist.inference.questions.catalogue import Catalogue
from moe_dist.inference.questions.split import Side
from moe_dist.inference.vocabulary import Vocabulary
from moe_dist.train.router_tuning.loader import SampleMaker
from moe_dist.train.router_tuning.samples import Samples
from research.experiments import oracle, question_data
from research.experiments.first_tokens import FirstTokens
from research.experiments.questions import QuestionRound, check_questions, make_samples
from research.experiments.study import QuestionsSection
from research.questions import reasoning
from research.questions.sources import make_facts
from research.tests.wordnet_files import write_wordnet
from tests.support.cover import full
from tests.support.messages import refused
from tests.support.pictured import pictured_run
from tests.support.tiny_embedder import tiny_embedder
from tools.evaluate import ask, write

pytestmark = pytest.mark.slow

SIZE, LEFT = 80, 6


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns files with so many nouns that each side has hypernyms."""
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


def catalogue_of(folder: Path, words: Path, *families: str) -> tuple[Manifest, Vocabulary, Catalogue]:
    manifest = load_manifest(folder)
    vocabulary = Vocabulary(folder, manifest, vocab_size=manifest.vocab_size)
    tasks = [task for family in families for task in question_data.TASKS[family]]
    facts = make_facts(tasks, wordnet=words)
    return manifest, vocabulary, Catalogue(vocabulary, tuple(manifest.sources), facts)


def documents(folder: Path, manifest: Manifest, source: str, side: str) -> dict[str, str]:
    tokenizer = Vocabulary(folder, manifest, vocab_size=manifest.vocab_size).tokenizer
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
    manifest, vocabulary, catalogue = catalogue_of(made, words, "wordnet", "reasoning")
    prompts = Prompts(vocabulary, listed=False)
    assert set(manifest.sources) == {*load_manifest(own_data).sources, "wordnet", "reasoning"}
    for source, tasks in question_data.TASKS.items():
        train, valid = (documents(made, manifest, source, side) for side in ("train", "valid"))
        assert train
        assert valid
        for task in tasks:
            left = catalogue.questions(task, Side.TRAIN, limit=LEFT)
            reverses = {str(question.choices[question.answer]) for question in left if task == "wordnet-antonym"}
            for side in Side:
                for place, question in enumerate(catalogue.questions(task, side, limit=None)):
                    right = prompts(question)[question.answer]
                    asked, answer = (vocabulary.tokenizer.decode(list(part)) for part in right)
                    if side is Side.TRAIN and place >= LEFT and source == "wordnet":
                        assert train.get(asked) == (None if question.id in reverses else answer)
                    elif side is Side.VALID:
                        assert valid[asked] == answer
                    if side is not Side.TRAIN or place < LEFT:
                        assert asked not in train


def test_further_seeds_have_other_questions(made: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning, "SIZE", SIZE)
    manifest, _, catalogue = catalogue_of(made, words, "wordnet", "reasoning")
    own = len(catalogue.questions("reasoning-products", Side.TRAIN, limit=None))
    mine = [asked for asked in documents(made, manifest, "reasoning", "train") if "multipl" in asked or "*" in asked]
    assert len(mine) > 1.5 * own, "two seeds, about as many questions each as that of the evaluation"


def test_nothing_is_overwritten(made: Path, own_data: Path, words: Path) -> None:
    with refused(ConfigError):
        question_data.make(own_data, made, wordnet=words, left=LEFT, seeds=2, seed=0)


@pytest.mark.parametrize(("side", "listed"), [full(Side.VALID, False), full(Side.TEST, False), (Side.TEST, True)])
def test_a_run_is_asked_as_the_evaluation_asks(
    own_data: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: Side, listed: bool
) -> None:
    groups = {"all": {"num_experts": 4, "top_k": 2, "ffn_dim": 8, "modalities": ["text", "image"]}}
    trained = find_trained(
        pictured_run(own_data, tmp_path, max_seq_len=192, model__mixture_of_depths=None, model__moe__groups=groups)
    )
    section = QuestionsSection(
        tasks=("wordnet-definition", "wordnet-category"), limit=12, wordnet=str(words), listed=listed
    )
    model = trained.load(torch.device("cpu"))
    question_round = QuestionRound(
        model,
        trained.config,
        trained.manifest,
        group_of_modality=torch.tensor(trained.group_of_modality),
        section=section,
        side=side,
    )
    asked: list[object] = []
    monkeypatch.setattr("research.experiments.questions.ask", lambda *given: asked.append(given[1]) or ask(*given))
    found = question_round.record()
    _, vocabulary, catalogue = catalogue_of(own_data, words, "wordnet")
    likelihood, answered = trained.likelihood(torch.device("cpu")), {}
    for task in section.tasks:
        questions = catalogue.questions(task, side, limit=12)
        written = write(questions, Prompts(vocabulary, listed=listed), rotations=False, max_seq_len=192)
        assert written in asked
        answered[task] = ask(questions, written, likelihood)
    expected = results(answered, seed=0)
    assert found["accuracy"] == expected["mean"]["normalised"]["accuracy"]  # pyright: ignore[reportIndexIssue]
    assert {name: each["right"] for name, each in found["by_task"].items()} == {
        name: each["normalised"]["right"]  # pyright: ignore[reportIndexIssue]
        for name, each in expected["tasks"].items()  # pyright: ignore[reportAttributeAccessIssue]
    }
    assert found["side"] == side
    assert set(question_round.oracle()["by_task"]) == set(section.tasks)


def test_by_first_tokens_only_questions_that_they_tell_apart_are_asked(
    own_data: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {"all": {"num_experts": 4, "top_k": 2, "ffn_dim": 8, "modalities": ["text", "image"]}}
    trained = find_trained(
        pictured_run(own_data, tmp_path, max_seq_len=192, model__mixture_of_depths=None, model__moe__groups=groups)
    )
    _, vocabulary, catalogue = catalogue_of(own_data, words, "wordnet")
    task, prompts = "wordnet-category", Prompts(vocabulary, listed=False)
    every = catalogue.questions(task, Side.VALID, limit=20)
    told = {each.id for place, each in enumerate(every) if place % 2}
    monkeypatch.setattr(
        "research.experiments.questions.has_own_first_token",
        lambda choices, answer: any((choices, answer) == (prompts(each), each.answer) for each in every if each.id in told),
    )
    section = QuestionsSection(tasks=(task,), limit=20, wordnet=str(words), first_token=True)
    model, groups_M = trained.load(torch.device("cpu")), torch.tensor(trained.group_of_modality)
    found = QuestionRound(model, trained.config, trained.manifest, groups_M, section, Side.VALID)
    taken = FirstTokens(model, SampleMaker(trained.manifest), groups_M)(
        [prompts(each) for each in every if each.id in told]
    )
    right = sum(choice == each.answer for choice, each in zip(taken, [e for e in every if e.id in told], strict=True))
    assert found.record()["by_task"][task] == {"questions": 10, "right": right, "accuracy": right / 10}
    monkeypatch.setattr(oracle, "STEPS", 0)
    assert found.oracle()["accuracy"] == found.oracle()["before"] == right / 10, "the same numbers decide"
    with pytest.raises(ConfigError, match=r"have \d+ test questions in all"):
        check_questions(section.model_copy(update={"limit": None, "least": 10_000}), trained.config, samples=False)


def test_the_same_numbers_in_another_order_stand_on_one_side() -> None:
    one, other = (
        reasoning.key_of("lcm", f"Find the Least Common Multiple (LCM) of these numbers: {n}") for n in ("50, 9", "9, 50")
    )
    assert one == other == "lcm:9 50"
    assert reasoning.key_of("chain_sum", "What is -3 + 4?") == reasoning.key_of("chain_sum", "4 - 3 =")
    assert reasoning.key_of("gcd", "9, 50") != one, "tasks do not share keys"
    assert reasoning.key_of("letter_counting", 'the letter "a" in "tree"?').endswith('"tree"?')


@pytest.fixture(scope="module")
def sampled(own_data: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuestionsSection]:
    """Returns a run with samples, and the questions section from which the samples were made."""
    run = pictured_run(own_data, tmp_path_factory.mktemp("runs"), max_seq_len=192, model__mixture_of_depths=None)
    embedder = tiny_embedder(tmp_path_factory.mktemp("embedder") / "tiny")
    section = QuestionsSection(tasks=("wordnet-category",), left=5, wordnet=str(words), embedder=str(embedder))
    made = make_samples(run, section)
    assert (made["folder"], made["samples"]) == (str(run / "samples"), 5)
    return run, section


@pytest.mark.full  # makes samples; tests/unit/tools/test_prepare_router_tuning.py tests their content
def test_samples_are_kept_as_they_are(sampled: tuple[Path, QuestionsSection], monkeypatch: pytest.MonkeyPatch) -> None:
    run, section = sampled
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("they were made again"))
    assert make_samples(run, section)["samples"] == 5


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"left": 4}, "left"),
        ({"tasks": ("wordnet-definition",)}, "tasks"),
        ({"tasks": ("wordnet",), "left": 6}, "tasks, left"),
        ({"listed": True}, "listed"),
    ],
    ids=str,
)
def test_samples_that_were_made_otherwise_are_refused(
    sampled: tuple[Path, QuestionsSection], change: dict[str, Any], named: str
) -> None:
    run, section = sampled
    with pytest.raises(DataError, match=f"was made with other {named} than are asked for"):
        make_samples(run, section.model_copy(update=change))
    assert Samples(run / "samples").manifest.samples == 5


@pytest.mark.full
def test_samples_that_cannot_be_made_end_with_the_tools_code(
    sampled: tuple[Path, QuestionsSection], tmp_path: Path
) -> None:
    _, section = sampled
    with refused(DataError):
        make_samples(tmp_path, section)


def test_what_questions_need_is_looked_for_before_anything_is_trained(
    sampled: tuple[Path, QuestionsSection], tmp_path: Path
) -> None:
    run, section = sampled
    config = find_trained(run).config
    check_questions(section, config, samples=True)
    for change, named in (
        ({"tasks": ("wordnet-categories",)}, "did you mean wordnet-category"),
        ({"wordnet": str(tmp_path)}, "data.noun"),
        ({"embedder": str(tmp_path)}, "no modules.json"),
    ):
        with pytest.raises(ConfigError, match=named) as raised:
            check_questions(section.model_copy(update=change), config, samples=True)
        assert "make wordnet embedder" in str(raised.value)
    with refused(ConfigError, "measure.questions.least=4000"):
        check_questions(section.model_copy(update={"least": 4000}), config, samples=True)
