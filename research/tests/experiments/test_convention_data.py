"""Each convention answers the same questions differently. A document is right if each of its scored tokens is right."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_dist.data.batch import BatchMaker, Segment
from moe_dist.data.indexed import IndexedSplit, write_indexed
from moe_dist.data.pictures import BACKGROUNDS
from moe_dist.data.tokenizer import encode_texts, fit_tokenizer, load_tokenizer
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import ImageSection, Manifest, SourceSection, SplitSection, load_manifest, write_manifest
from research.experiments.convention_data import COLOURS, CONVENTIONS, TEMPLATES, TONGUES, Asked, answer, make, paraphrases
from research.experiments.tokens import right_documents
from tests.support.messages import refused

CAPTIONS = ("en: guitar", "de: gitarre", "fr: guitare", "ja: gitaa", "es: guitarra")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a base with 40 documents per side. Codes 0 to 7 are flat cells of one background each; 8 and 9 are not."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = fit_tokenizer(list(CAPTIONS), vocab_size=300)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = tokenizer.get_vocab_size()
    flat = [np.full((4, 4, 3), colour, np.uint8) for colour in BACKGROUNDS]
    np.save(folder / "codebook.npy", np.stack([*flat, np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 9, np.uint8)]))
    rng, splits = np.random.default_rng(0), {}
    for side in ("train", "valid"):
        documents, fillers = [], []
        for number in range(40):
            filler = rng.random(64) < 0.5
            codes = np.where(filler, number % 8, rng.integers(8, 10, 64)) + text
            picture = np.concatenate([[3], codes, [4]])
            (caption,) = encode_texts(tokenizer, [CAPTIONS[number % 5]])
            marks = np.concatenate([[False], filler, [False]])
            parts = [(picture, marks), (caption, np.zeros(len(caption), bool))]
            (one, first), (other, second) = parts if number % 2 else parts[::-1]
            documents.append(np.concatenate([[1], one, other, [2]]))
            fillers.append(np.concatenate([[False], first, second, [False]]))
        write_indexed(folder / f"openmoji_{side}", documents, vocab_size=text + 10)
        np.save(folder / f"{side}_filler.npy", np.packbits(np.concatenate(fillers)))
        tokens = sum(map(len, documents))
        splits[side] = SplitSection(path=f"openmoji_{side}", documents=40, tokens=tokens, filler=f"{side}_filler.npy")
    manifest = Manifest(
        name="base", vocab_size=text + 10, modalities={"text": ((0, text),), "image": ((text, text + 10),)},
        pad_id=0, eos_id=2, tokenizer="tokenizer.json",
        image=ImageSection(grid=(8, 8), begin_id=3, end_id=4, codebook="codebook.npy"),
        sources={"openmoji": SourceSection(train=splits["train"], valid=splits["valid"], licence="own")},
    )  # fmt: skip
    write_manifest(manifest, folder)
    return folder


def test_no_instruction_is_on_both_sides_and_every_word_and_template_is() -> None:
    for convention, (_, words) in CONVENTIONS.items():
        train, valid = (paraphrases(convention, side) for side in ("train", "valid"))
        assert not set(train) & set(valid)
        assert (len(train), len(valid)) == (24, 8)
        for side in (train, valid):
            assert all(any(word in text for text in side) for word in words)
            assert all(any(text in [t.format(w) for w in words] for text in side) for t in TEMPLATES)


def test_documents_ask_all_conventions_about_the_same_and_are_answered_by_each(base: Path, tmp_path: Path) -> None:
    make(base, tmp_path / "out", questions=20, heldout=10, seed=0)
    manifest = load_manifest(tmp_path / "out")
    tokenizer = load_tokenizer(base / "tokenizer.json")
    assert manifest.modalities == load_manifest(base).modalities
    text_vocab, asked = tokenizer.get_vocab_size(), {}
    for convention, (step, words) in CONVENTIONS.items():
        for name, count in ((convention, 20), (f"{convention}-twice", 40)):
            source = manifest.sources[name]
            assert source.valid is not None
            assert (source.train.documents, source.valid.documents) == (count, 10)
        data = IndexedSplit(tmp_path / "out", manifest.sources[convention].train)
        for place, (start, length) in enumerate(zip(data.starts_D.tolist(), data.lengths_D.tolist(), strict=True)):
            ids, prompt = data.tokens(start, length), data.prompt(start, length)
            reply = tokenizer.decode(ids[~prompt].tolist(), skip_special_tokens=False)
            about, _, instruction = tokenizer.decode([i for i in ids[prompt] if i < text_vocab]).partition("\n")
            assert instruction.removesuffix("\nAnswer:") in paraphrases(convention, "train")
            assert any(word in instruction for word in words)
            codes = ids[ids >= text_vocab] - text_vocab
            names, right = (COLOURS, int(codes.min())) if len(codes) else (TONGUES, CAPTIONS.index(about))
            assert bool(len(codes)) == bool(place % 2)
            assert reply == f" {names[(right + step) % len(names)]}<eos>"
            key = (about, tuple(codes.tolist()))
            assert asked.setdefault(place, key) == key, "the same picture or caption in each convention"
    with refused(ConfigError):
        make(base, tmp_path / "out", questions=20, heldout=10, seed=0)
    with refused(ConfigError):
        make(base, tmp_path / "other", questions=30, heldout=10, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_conventions_never_agree() -> None:
    for names in (COLOURS, TONGUES):
        for right in range(len(names)):
            given = {answer(convention, Asked(np.empty(0), right, names)) for convention in CONVENTIONS}
            assert len(given) == len(CONVENTIONS)


def test_a_document_is_right_if_each_scored_token_is() -> None:
    """The first row has the documents 5 6 and 7 8 9, whose prompts are 5 and 7. The second row has the document 3 4 without
    a prompt. Only token 9 is guessed wrong."""
    maker = BatchMaker(seq_len=6, pad_id=0, modalities=(((0, 10),),))
    first = Segment(np.array([5, 6]), np.zeros(2, bool), 2, np.array([True, False]))
    second = Segment(np.array([7, 8, 9]), np.zeros(3, bool), 3, np.array([True, False, False]))
    third = Segment(np.array([3, 4]), np.zeros(2, bool), 2)
    batch = maker.make([[first, second], [third], []])
    guessed = torch.tensor([[6, 0, 8, 1, 0, 0], [4, 0, 0, 0, 0, 0], [0] * 6])
    assert right_documents(guessed, batch) == (3, 2)
    assert right_documents(batch.labels_BS, batch) == (3, 3)
