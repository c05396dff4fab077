"""Runs the command prepare_data on a user's own files, and tests its output and its errors."""

import errno
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image, ImageDraw

from moe_dist.data import corpus_build, picture_coding
from moe_dist.data.corpus import Corpus, HoldOut, Recipe
from moe_dist.data.corpus_files import picture_files
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.prepare import Inputs, prepare
from moe_dist.data.tokenizer import load_tokenizer
from moe_dist.errors import ConfigError, DataError, StorageError
from moe_dist.formats.manifest import load_manifest
from tests.support.invoked import invoke
from tests.support.messages import refused
from tools.prepare_data import main

RECIPE = Recipe(renders=3, heldout_renders=2, codes=16, vocab_size=300, val_fraction=0.2)
OPTIONS = ["--renders", "3", "--heldout-renders", "2", "--codes", "16", "--vocab-size", "300", "--val-fraction", "0.2"]


def silent(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with 40 pictures, half of them with captions, and 60 texts."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        image = Image.new("RGBA", (48, 48))
        for _ in range(4):
            x, y = rng.integers(0, 36, 2).tolist()
            ImageDraw.Draw(image).ellipse((x, y, x + 14, y + 14), fill=(*rng.integers(0, 256, 3).tolist(), 255))
        image.save(folder / f"pictures/{number:02}.png")
        if number % 2:
            (folder / f"pictures/{number:02}.txt").write_text(f"picture number {number}")
    lines = [json.dumps({"text": f"text {number} " * (1 + number % 7)}) for number in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


def inputs(own: Path) -> Inputs:
    return Inputs(text=str(own / "texts.jsonl"), images=str(own / "pictures"), licence="CC0-1.0")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepare(out := tmp_path_factory.mktemp("made") / "set", inputs(own), RECIPE, silent)
    return out


def test_the_command_makes_the_same_bytes_again(own: Path, made: Path, tmp_path: Path) -> None:
    arguments = ("--text", own / "texts.jsonl", "--images", own / "pictures", "--licence", "CC0-1.0", *OPTIONS)
    assert "made in" in invoke(main, "--out", tmp_path / "set", *arguments, code=0).output
    assert contents(tmp_path / "set") == contents(made)
    assert "nothing to do" in invoke(main, "--out", tmp_path / "set", *arguments, code=0).output
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["set"]


def test_equal_files_are_on_one_side_and_captions_on_their_pictures(own: Path, made: Path) -> None:
    manifest = load_manifest(made)
    tokenizer = load_tokenizer(made / "tokenizer.json")
    captions = {}
    for side in ("train", "valid"):
        split = getattr(manifest.sources["images"], side)
        data = IndexedSplit(made, split)
        texts = set()
        for start, length in zip(data.starts_D.tolist(), data.lengths_D.tolist(), strict=True):
            ids = data.tokens(start, length)
            texts.add(tokenizer.decode([id_ for id_ in ids if id_ < tokenizer.get_vocab_size()]))
        captions[side] = texts - {""}
    assert not captions["train"] & captions["valid"]
    assert captions["train"] | captions["valid"] == {f"picture number {number}" for number in range(1, 40, 2)}


def test_held_out_captions_and_texts_do_not_reach_the_tokenizer(own: Path, made: Path, monkeypatch, tmp_path: Path) -> None:
    seen: list[str] = []
    fit = corpus_build.fit_tokenizer

    def recorded(texts, *, vocab_size: int):
        seen.extend(texts)
        return fit(seen, vocab_size=vocab_size)

    monkeypatch.setattr(corpus_build, "fit_tokenizer", recorded)
    prepare(tmp_path / "set", inputs(own), RECIPE, silent)
    tokenizer, manifest = load_tokenizer(made / "tokenizer.json"), load_manifest(made)
    for source in ("images", "text"):
        data = IndexedSplit(made, manifest.sources[source].valid)
        for start, length in zip(data.starts_D.tolist(), data.lengths_D.tolist(), strict=True):
            held_out = tokenizer.decode([id_ for id_ in data.tokens(start, length) if id_ < tokenizer.get_vocab_size()])
            assert not held_out or held_out not in seen
    assert len(seen) > 50


def test_texts_alone_and_a_tokenizer_and_codebook_of_another_set(own: Path, made: Path, tmp_path: Path) -> None:
    manifest, _ = prepare(tmp_path / "text", Inputs(text=str(own / "texts.jsonl")), RECIPE, silent)
    assert list(manifest.modalities) == ["text"]
    assert manifest.image is None
    recipe = replace(RECIPE, tokenizer=str(made / "tokenizer.json"), codebook=str(made / "codebook.npy"))
    pictures = Inputs(images=str(own / "pictures"), extra_text={"more": str(own / "texts.jsonl")})
    manifest, _ = prepare(tmp_path / "reused", pictures, recipe, silent)
    assert list(manifest.sources) == ["images", "more"]
    assert manifest.modalities == load_manifest(made).modalities
    for file in ("codebook.npy", "images_train.bin"):
        assert (tmp_path / "reused" / file).read_bytes() == (made / file).read_bytes()


def test_a_tokenizer_that_takes_all_memory_is_refused(
    own: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_build, "_ENCODE_MEMORY", 1 << 28)
    replacing = {"type": "Replace", "pattern": {"String": "t"}, "content": "t" * 100}
    values = json.loads((made / "tokenizer.json").read_text())
    values["normalizer"] = {"type": "Sequence", "normalizers": [replacing] * 5}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    recipe = replace(RECIPE, tokenizer=str(tmp_path / "tokenizer.json"))
    with refused(DataError, "--tokenizer", "give another tokenizer", golden=False):
        prepare(tmp_path / "set", Inputs(text=str(own / "texts.jsonl")), recipe, silent)


def test_instructions_on_the_ids_of_another_set(own: Path, made: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": f"What is number {number}?", "answer": f"picture {number}", "image": f"pictures/{number:02}.png"}
        for number in range(20)
    ]
    (own / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("--tokenizer", made / "tokenizer.json", "--instructions", f"asked={own / 'asked.jsonl'}", *OPTIONS)
    result = invoke(main, "--out", tmp_path / "without", *arguments, code=78)
    assert "20 lines have an image, but there is no codebook" in result.output.replace("\n", " ")
    invoke(main, "--out", tmp_path / "set", *arguments, "--codebook", made / "codebook.npy", code=0)
    manifest, base = load_manifest(tmp_path / "set"), load_manifest(made)
    assert (manifest.modalities, manifest.vocab_size) == (base.modalities, base.vocab_size)
    source, tokenizer = manifest.sources["asked"], load_tokenizer(made / "tokenizer.json")
    assert (source.train.documents + source.valid.documents, source.valid.documents) == (20, 4)
    for split in (source.train, source.valid):
        data = IndexedSplit(tmp_path / "set", split)
        for start, length in zip(data.starts_D.tolist(), data.lengths_D.tolist(), strict=True):
            ids, prompt = data.tokens(start, length), data.prompt(start, length)
            assert (ids[0], ids[1], ids[66], ids[-1]) == (1, 3, 4, 2)  # <bos><boi> 64 codes <eoi> ... <eos>
            assert (ids[2:66] >= tokenizer.get_vocab_size()).all()
            number = tokenizer.decode(ids[prompt][67:].tolist()).removeprefix("What is number ").removesuffix("?")
            assert tokenizer.decode(ids[~prompt].tolist(), skip_special_tokens=False) == f" picture {number}<eos>"
            assert data.filler(start, length)[2:66].any()
            assert not data.filler(start, length)[67:].any()


def test_a_family_of_instructions_is_on_one_side_in_all_sources(tmp_path: Path) -> None:
    def write(name: str, *, length: int, side: dict[int, str]) -> str:
        lines = [
            {"prompt": f"{number}" + "?" * length, "answer": "yes", "family": f"f{number}"}
            | ({"side": side[number]} if side else {})
            for number in range(40)
        ]
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
        return str(tmp_path / name)

    def held_out(out: str, **sources: str) -> dict[str, set[str]]:
        manifest, _ = prepare(tmp_path / out, Inputs(instructions=sources), RECIPE, silent)
        tokenizer, found = load_tokenizer(tmp_path / out / "tokenizer.json"), {}
        for name, source in manifest.sources.items():
            data = IndexedSplit(tmp_path / out, source.valid)
            found[name] = {
                tokenizer.decode(data.tokens(start, length).tolist()).split("?")[0]
                for start, length in zip(data.starts_D.tolist(), data.lengths_D.tolist(), strict=True)
            }
        return found

    short, long = write("short.jsonl", length=1, side={}), write("long.jsonl", length=50, side={})
    found = held_out("drawn", short=short, long=long)
    assert found["short"] == found["long"] != set()
    given = {number: "valid" if number % 4 == 0 else "train" for number in range(40)}
    found = held_out("given", long=long, sided=write("sided.jsonl", length=1, side=given))
    assert found["long"] == found["sided"] == {str(number) for number in range(0, 40, 4)}
    other = write("other.jsonl", length=3, side={**given, 7: "valid"})
    with refused(DataError):
        held_out("both", sided=str(tmp_path / "sided.jsonl"), other=other)
    whole = tmp_path / "whole.jsonl"
    whole.write_text(json.dumps({"prompt": "a", "answer": "b", "family": "f0"}))
    with refused(DataError):
        held_out("none left", whole=str(whole), sided=str(tmp_path / "sided.jsonl"))


def test_a_set_made_otherwise_is_not_touched(own: Path, made: Path) -> None:
    before = contents(made)
    result = invoke(main, "--out", made, "--images", own / "pictures", *OPTIONS[:-1], "0.3", code=78)
    assert "recipe.val_fraction is 0.2, asked for 0.3" in result.output
    assert contents(made) == before


def test_a_folder_of_something_else_is_not_touched(own: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with refused(ConfigError):
        prepare(tmp_path, inputs(own), RECIPE, silent)
    with refused(ConfigError):
        prepare(tmp_path / "thesis.txt", inputs(own), RECIPE, silent)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing_half(own: Path, tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "count baselines":
            raise error

    with pytest.raises(error):
        prepare(tmp_path / "set", inputs(own), RECIPE, interrupted)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    (tmp_path / ".set.partial").mkdir()  # a killed command leaves this folder
    (tmp_path / ".set.partial/text_train.bin").write_bytes(b"half")
    (tmp_path / "set").mkdir()  # an empty folder counts as missing
    prepare(tmp_path / "set", inputs(own), RECIPE, silent)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["set"]


def test_a_second_writer_waits_and_finds_it_done(own: Path, made: Path, tmp_path: Path) -> None:
    waiting, answer = threading.Event(), []

    def report(stage: str, done: int, total: int) -> None:
        assert stage == "wait for another writer"
        waiting.set()

    lock = FileLock(tmp_path / ".set.lock")
    with lock:
        second = threading.Thread(target=lambda: answer.append(prepare(tmp_path / "set", inputs(own), RECIPE, report)))
        second.start()
        assert waiting.wait(600)
        made_elsewhere = tmp_path / "elsewhere"
        made_elsewhere.mkdir()
        for name, content in contents(made).items():
            (made_elsewhere / name).write_bytes(content)
        made_elsewhere.rename(tmp_path / "set")
    second.join(600)
    assert answer == [(load_manifest(made), False)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--extra-text", "../x=."), "letters, digits"),
        (("--extra-text", "python=."), "rename"),
        (("--text", "missing"), "no such file or folder"),
        (("--images", "missing"), "no such folder"),
        (("--instructions", "asked=missing"), "no such file"),
        (("--instructions", "nothing"), "NAME=PATH"),
        (("--instructions", "text=missing"), "rename"),
        (("--instructions", "a=missing", "--extra-text", "a=missing"), "has the same name"),
        (("--vary", "place,colour"), "--vary colour: renders differ in some of place,flip,background"),
        (("--languages", "en,it"), "--languages it: the pictures have names in en, de, fr, ja, es"),
        (("--languages", "en,fr,en", "--text", "missing"), "--languages en,fr: selects captions of the default"),
    ],
)
def test_what_cannot_be_is_78(tmp_path: Path, arguments: tuple[str, str], words: str) -> None:
    assert words in invoke(main, "--out", tmp_path / "set", *arguments, code=78).output
    assert not (tmp_path / "set").exists()


def test_without_variants_none_can_be_held_out(own: Path, tmp_path: Path) -> None:
    result = invoke(
        main, "--out", tmp_path / "set", "--images", own / "pictures", "--hold-out", "variants", *OPTIONS, code=78
    )
    assert "no picture has a variant in training" in result.output.replace("\n", " ")
    assert not (tmp_path / "set").exists()
    recipe = replace(RECIPE, hold_out=HoldOut.VARIANTS, val_fraction=0.0)
    manifest, _ = prepare(tmp_path / "all", Inputs(images=str(own / "pictures")), recipe, silent)
    assert manifest.sources["images"].valid is None, "nothing is asked for, nothing is refused"


@pytest.mark.parametrize("asked", ["--hold-out variants", "--vary place", "--vary , --caption-first 1"])
def test_without_pictures_nothing_is_asked_of_them(own: Path, tmp_path: Path, asked: str) -> None:
    result = invoke(main, "--out", tmp_path / "set", "--text", own / "texts.jsonl", *asked.split(), *OPTIONS, code=78)
    named = ", ".join(word for word in asked.split() if word.startswith("--"))
    assert f"{named}: applies to pictures, and this data set has none; leave it out" in result.output.replace("\n", " ")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("one_component", [False, True])
def test_held_out_variants(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_component: bool) -> None:
    """The pictures are ten families of four. If all variants look alike, only all pictures together could be held out,
    which is too many."""
    source = picture_files("images", own / "pictures", "CC0-1.0")
    every = [replace(each, family=f"family {number // 4}") for number, each in enumerate(source.items)]
    monkeypatch.setattr("moe_dist.data.prepare._sources", lambda *_: Corpus(replace(source, items=tuple(every))))
    if one_component:
        variants = [number for number in range(40) if number % 4]
        monkeypatch.setattr(picture_coding, "near_pairs", lambda *_, most: [(1, each) for each in variants])
        with refused(ConfigError):
            prepare(tmp_path / "set", Inputs(), replace(RECIPE, hold_out=HoldOut.VARIANTS), silent)
        return
    manifest, _ = prepare(tmp_path / "set", Inputs(), replace(RECIPE, hold_out=HoldOut.VARIANTS), silent)
    held_out = manifest.sources["images"].valid
    assert held_out.documents == 8 * RECIPE.heldout_renders
    figures = json.loads((tmp_path / "set/recipe.json").read_text())["figures"]
    assert (figures["train_pictures"], figures["train_components"], figures["valid_components"]) == (32, 32, 8)


def picture_documents(folder: Path) -> list[np.ndarray]:
    data = IndexedSplit(folder, load_manifest(folder).sources["images"].train)
    return [data.tokens(*at) for at in zip(data.starts_D.tolist(), data.lengths_D.tolist(), strict=True)]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.slow
def test_captions_are_before_the_picture_in_the_share_asked_for(own: Path, tmp_path: Path, share: float) -> None:
    recipe = replace(RECIPE, renders=8, caption_first=share, vary=())
    prepare(tmp_path / "set", Inputs(images=str(own / "pictures")), recipe, silent)
    documents = picture_documents(tmp_path / "set")
    # A document is <bos><boi> 64 codes <eoi> caption <eos>, or has the caption before <boi>. `first` says for each
    # (picture, render) whether the caption comes first.
    first = {divmod(place, 8): tokens[1] != 3 for place, tokens in enumerate(documents) if len(tokens) > 68}
    assert np.mean(list(first.values())) == share
    if share == 0.5:
        assert all(before == ((number + render) % 2 == 1) for (number, render), before in first.items())
    assert len({tokens[(tokens >= 300)].tobytes() for tokens in documents}) * 8 == len(documents), "nothing varies"


def test_a_set_that_is_older_than_an_option_was_made_by_its_default(own: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "set", inputs(own), RECIPE, silent)
    path = tmp_path / "set/recipe.json"
    older = json.loads(path.read_text())
    for section, key in (("inputs", "languages"), ("recipe", "hold_out"), ("recipe", "vary"), ("recipe", "caption_first")):
        del older[section][key]
    path.write_text(json.dumps(older))
    assert not prepare(tmp_path / "set", inputs(own), RECIPE, silent)[1]
    with refused(ConfigError, "recipe.caption_first"):
        prepare(tmp_path / "set", inputs(own), replace(RECIPE, caption_first=0.9), silent)
    older["recipe"]["colours"] = "few"
    path.write_text(json.dumps(older))
    with refused(ConfigError, "recipe.colours"):
        prepare(tmp_path / "set", inputs(own), RECIPE, silent)


@pytest.mark.parametrize(
    "content", [b"[]", b"[" * 100_000, b"{}", b"\xff\xfe", None], ids=["list", "deep", "empty", "bytes", "sparse"]
)
def test_a_damaged_recipe_is_named(own: Path, tmp_path: Path, content: bytes | None) -> None:
    out = tmp_path / "set"
    out.mkdir()
    (out / "manifest.json").touch()
    with (out / "recipe.json").open("wb") as stream:
        stream.write(content or b"")
        stream.truncate(None if content else 6 << 30)  # a sparse file, without blocks on the disk
    with pytest.raises(DataError, match=r"recipe\.json: damaged"):
        prepare(out, inputs(own), RECIPE, silent)


def test_what_cannot_be_read_is_left_out_and_named_or_refused(own: Path, tmp_path: Path) -> None:
    texts, pictures = tmp_path / "texts", tmp_path / "pictures"
    texts.mkdir()
    shutil.copytree(own / "pictures", pictures)
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"text number {number} with a few words")
    for number in range(7):
        (texts / f"latin{number}.txt").write_bytes(b"caf\xe9")
    (pictures / "00.png").write_bytes(b"no picture")
    asked = ("--text", texts, "--images", pictures, *OPTIONS)
    result = invoke(main, "--out", tmp_path / "set", *asked, code=0)
    assert result.output.count("left out: ") == 6
    assert "latin0.txt: not UTF-8 at byte 3" in result.output
    assert "left out: 3 more" in result.output
    recipe = json.loads((tmp_path / "set/recipe.json").read_text())
    assert len(recipe["skipped"]) == 8
    assert "00.png" in recipe["skipped"][-1]
    assert recipe["figures"]["train_pictures"] + recipe["figures"]["valid_pictures"] == 39
    again = invoke(main, "--out", tmp_path / "set", *asked)
    assert again.output.count("left out: ") == 6
    assert "nothing to do" in again.output
    assert invoke(main, "--out", tmp_path / "set", *asked, "--strict").exit_code == 65
    strict = invoke(main, "--out", tmp_path / "strict", *asked, "--strict", code=65)
    assert "latin0.txt: not UTF-8 at byte 3" in strict.output
    assert not (tmp_path / "strict").exists()


def test_a_full_disk_is_told(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(StorageError, match=r"--out .*/set: .*No space left on device; nothing was made"):
        prepare(tmp_path / "set", inputs(own), RECIPE, silent)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
