"""The questions' alphabets have no common tokens, and the answers in different alphabets contradict each other."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moe_dist.data.indexed import IndexedSplit
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest, SplitSection, load_manifest
from research.experiments.domain_data import DOMAINS, FILLERS, FIRST, HELD_OUT, PARALLEL, TEXTS, alphabets, make, rules
from tests.support.messages import refused

ITEMS, LENGTH = 24, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains") / "data"
    make(folder, items=ITEMS, questions=240, parallel=3000, heldout=120, seed=3)
    return folder


def written(folder: Path, split: SplitSection) -> np.ndarray:
    """Returns all documents, [documents, tokens], and requires that only each document's answer is scored."""
    data = IndexedSplit(folder, split)
    assert set(data.lengths_D.tolist()) == {LENGTH}
    prompt = data.prompt(0, data.header.tokens).reshape(-1, LENGTH)
    assert prompt[:, :-1].all()
    assert not prompt[:, -1].any()
    return data.tokens(0, data.header.tokens).reshape(-1, LENGTH)


def sides(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    source = load_manifest(folder).sources[name]
    assert source.valid is not None
    return written(folder, source.train), written(folder, source.valid)


def domain_of(manifest: Manifest, ids: np.ndarray) -> np.ndarray:
    ends = [ranges[0][1] for ranges in manifest.modalities.values()]
    return np.searchsorted(ends, ids, side="right")


def test_answers_of_two_domains_never_agree_and_no_rule_keeps_an_item() -> None:
    found = np.concatenate([[np.arange(64)], rules(64, seed=0)])
    assert found.shape == (len(DOMAINS) + 1, 64)
    for rule in found:
        assert sorted(rule) == list(range(64))
    for i in range(len(found)):
        for j in range(i):
            assert (found[i] != found[j]).all()
    assert (rules(64, seed=1) != rules(64, seed=0)).any()


def test_each_token_of_a_domains_document_tells_the_domain(data: Path) -> None:
    manifest = load_manifest(data)
    assert tuple(manifest.modalities) == DOMAINS
    for number, domain in enumerate(DOMAINS):
        for name in (domain, f"{domain}-twice"):
            for documents in sides(data, name):
                assert (domain_of(manifest, documents) == number).all()
                assert (documents >= FIRST).all(), "neither padding nor end of document"


def test_domains_answer_by_their_rule_and_the_base_by_the_item(data: Path) -> None:
    every, answers = alphabets(ITEMS), rules(ITEMS, seed=3)
    for number, domain in enumerate(DOMAINS):
        here = every[number]
        for documents in sides(data, domain):
            before, item, after, ask, answer = documents.T
            assert (ask == here.ask).all()
            assert (answer == here.item(0) + answers[number, item - here.item(0)]).all()
            for fillers in (before, after):
                assert ((fillers >= here.filler(0)) & (fillers < here.filler(FILLERS))).all()
            counts = Counter(item.tolist())
            assert len(counts) == ITEMS
            assert max(counts.values()) - min(counts.values()) <= 1
    of, to = set(), set()
    for documents in sides(data, PARALLEL):
        for before, item, after, ask, answer in documents.tolist():
            (asked,) = (each for each in every if each.ask <= item < each.end)
            (answered,) = (each for each in every if each.ask == ask)
            assert item - asked.item(0) == answer - answered.item(0)
            assert all(asked.filler(0) <= filler < asked.filler(FILLERS) for filler in (before, after))
            of.add(asked)
            to.add(answered)
    assert len(of) == len(to) == len(DOMAINS)


def test_a_text_has_all_tokens_of_one_alphabet_alone(data: Path) -> None:
    manifest = load_manifest(data)
    source = manifest.sources[TEXTS]
    for split, count in ((source.train, 3000), (source.valid, 120)):
        assert split is not None
        read = IndexedSplit(data, split)
        texts = read.tokens(0, read.header.tokens).reshape(-1, LENGTH)
        prompt = read.prompt(0, read.header.tokens).reshape(-1, LENGTH)
        assert len(texts) == count
        assert prompt[:, 0].all()
        assert not prompt[:, 1:].any(), "each token that follows one is scored"
        domains = domain_of(manifest, texts)
        assert (domains == domains[:, :1]).all()
        assert set(domains[:, 0].tolist()) == set(range(len(DOMAINS)))
    assert len(np.unique(read.tokens(0, read.header.tokens))) > 100


def test_no_held_out_question_was_trained_on(data: Path) -> None:
    for name in (PARALLEL, *DOMAINS, *(f"{domain}-twice" for domain in DOMAINS)):
        train, valid = ({tuple(document) for document in side.tolist()} for side in sides(data, name))
        assert not train & valid
        assert len(train) == {PARALLEL: 3000}.get(name, 480 if name.endswith("-twice") else 240), "each once"
        assert len(valid) == 120
    train, valid = ({(item, ask) for _, item, _, ask, _ in side.tolist()} for side in sides(data, PARALLEL))
    assert not train & valid, "an item of an alphabet is written in some alphabets in training, in others held out"
    assert {item for item, _ in valid} <= {item for item, _ in train}


def test_twice_goes_on_where_once_ends(data: Path) -> None:
    for domain in DOMAINS:
        once, twice = sides(data, domain)[0], sides(data, f"{domain}-twice")[0]
        assert (twice[: len(once)] == once).all()
        assert len(twice) == 2 * len(once)


def test_the_same_seed_makes_the_same_data_and_nothing_is_overwritten(data: Path, tmp_path: Path) -> None:
    make(tmp_path / "again", items=ITEMS, questions=240, parallel=3000, heldout=120, seed=3)
    for name in ("manifest.json", "north_train.bin", "parallel_valid.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (data / name).read_bytes()
    with refused(ConfigError):
        make(tmp_path / "again", items=ITEMS, questions=240, parallel=3000, heldout=120, seed=3)
    most = ITEMS * FILLERS * FILLERS // HELD_OUT
    with refused(ConfigError):
        make(tmp_path / "many", items=ITEMS, questions=240, parallel=3000, heldout=most + 1, seed=3)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
