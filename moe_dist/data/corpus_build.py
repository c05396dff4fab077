"""Builds a data set folder: splits sources, fits tokenizer and codebook, encodes, writes, and counts baselines.

Tokenizer and codebook are fitted only on training data, because held-out data must not influence them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from moe_dist.data.baselines import count_baselines
from moe_dist.data.codebook import GRID, load_codebook
from moe_dist.data.corpus import Corpus, HoldOut, Instruction, Item, Picture, Recipe, Skip, Source, Text, refuse
from moe_dist.data.families import hold_out, join
from moe_dist.data.image_tokenizer import ImageTokenizer
from moe_dist.data.indexed import write_indexed
from moe_dist.data.picture_coding import Division, Document, PictureCoder, divide, rasterise_all
from moe_dist.data.picture_files import PictureRef, write_refs
from moe_dist.data.pictures import rasterise
from moe_dist.data.token_pictures import Ranges, chameleon_ids, check_options, codes_of, read_pictures
from moe_dist.data.token_pictures import documents as picture_documents
from moe_dist.data.token_pictures import held_out as held_out_pictures
from moe_dist.data.tokenizer import BOI, BOS, EOI, EOS, PAD, encode_texts, fit_tokenizer, load_tokenizer, special_ids
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import ImageSection, Manifest, SourceSection, SplitSection, write_manifest
from moe_dist.formats.split_files import count_by_modality
from moe_dist.formats.tokenizer_file import limited, read_tokenizer
from moe_dist.runtime.progress import Report

TOKENIZER_FILE = "tokenizer.json"
IMAGE_TOKENIZER, CODE_IDS = "image_tokenizer", "code_ids.npy"
CODEBOOK_FILE = "codebook.npy"
_FIT_CHARACTERS = 4_000_000  # number of characters per source for fitting the BPE, which takes seconds
_OF_PICTURES = ("hold_out", "vary", "caption_first")  # recipe fields that apply to pictures only
Encode = Callable[[Sequence[str]], list[np.ndarray]]
_ENCODE_SECONDS, _ENCODE_MEMORY = 600, 8 << 30  # limits of seconds and bytes for one call, which encodes many texts
_TEXT_CHUNK = 64  # number of texts encoded between two progress reports
_NOTHING = (np.empty(0, np.int64), np.empty(0, bool))  # tokens and filler flags of an instruction without a picture

Figures = dict[str, float]


def build(
    folder: Path, name: str, corpus: Corpus, recipe: Recipe, report: Report, skip: Skip = refuse
) -> tuple[Manifest, Figures]:
    """Writes a whole data set into `folder`, its manifest last.

    Returns:
        The manifest, and figures for display. The figures are the numbers of pictures and families on each side of the
        split, and the PSNR of decoded pictures in dB. With HoldOut.VARIANTS, sets of near-equal pictures replace families.

    Raises:
        ConfigError: the recipe has options for pictures, but the data set has no pictures.
        DataError: there are too few patches for the codebook, or `skip` raises for a damaged picture.
    """
    pictures, texts, division = corpus.pictures, corpus.texts, None
    image_tokenizer, codes_NC, held_out_N = None, np.empty(0), np.empty(0, bool)
    asked = [key for key in _OF_PICTURES if getattr(recipe, key) != getattr(Recipe, key)]
    if asked and not pictures:
        options = ", ".join(f"--{key.replace('_', '-')}" for key in asked)
        raise ConfigError(f"{options}: applies to pictures, and this data set has none; leave it out")
    fit_on: list[list[str]] = []
    if recipe.image_tokenizer is not None:
        check_options(recipe)
        image_tokenizer = ImageTokenizer(Path(recipe.image_tokenizer))
    if pictures and image_tokenizer:
        pictures, codes_NC = read_pictures(pictures, image_tokenizer, report, skip)
        held_out_N = held_out_pictures(pictures.items, codes_NC, recipe)
        fit_on.append([caption for picture in _kept(pictures.items, ~held_out_N) for caption in picture.captions])
    elif pictures:
        readable, rasters = rasterise_all(pictures.items, report, skip)
        pictures = replace(pictures, items=readable)
        division = divide(readable, rasters, recipe, report)
        shown = _kept(pictures.items, ~division.held_out_N)
        fit_on.append([caption for picture in shown for caption in picture.captions])
    held_out = {source.name: _held_out_texts(source.items, recipe) for source in texts}
    instructions_held_out = _held_out_instructions(corpus.instructions, recipe)
    fit_on += [_shown_texts(source.items, held_out[source.name]) for source in texts]
    fit_on += [
        [f"{each.prompt} {each.answer}" for each in _kept(source.items, ~instructions_held_out[source.name])]
        for source in corpus.instructions
    ]
    writer = _Writer(folder, name, _words(fit_on, recipe, image_tokenizer, report), recipe, report)
    if image_tokenizer:
        writer.take_image_tokenizer(image_tokenizer)
    if pictures and image_tokenizer:
        writer.add_token_pictures(pictures, codes_NC, held_out_N)
    elif pictures and division:
        writer.add_pictures(pictures, division)
    elif recipe.codebook:
        writer.take_codebook(load_codebook(recipe.codebook))
    for source in texts:
        writer.add_texts(source, held_out[source.name])
    for source in corpus.instructions:
        writer.add_instructions(source, instructions_held_out[source.name])
    return writer.finish()


def _held_out_texts(texts: Sequence[Text], recipe: Recipe) -> np.ndarray:
    sizes = np.array([len(text.content) for text in texts], np.int64)
    components = join([text.family for text in texts])
    return hold_out(components, sizes, fraction=recipe.val_fraction, seed=recipe.seed)


def _shown_texts(texts: Sequence[Text], held_out: np.ndarray) -> list[str]:
    return [text.content for text in _kept(texts, ~held_out)]


def _held_out_instructions(sources: Sequence[Source[Instruction]], recipe: Recipe) -> dict[str, np.ndarray]:
    """Returns for each source a mask of its held-out instructions. A family is on one side of the split in all sources. It
    is the side that any of the family's instructions names, else a random side. Raises DataError if instructions of a
    family name both sides, or if a source has no training instruction."""
    every = [each for source in sources for each in source.items]
    if not every:
        return {}
    family, side = join([each.family for each in every]), np.array([each.side for each in every])
    sizes = np.array([len(each.prompt) + len(each.answer) for each in every], np.int64)
    to_train, to_valid = (np.isin(family, family[side == name]) for name in ("train", "valid"))
    if (to_train & to_valid).any():
        one = every[int(np.flatnonzero(to_train & to_valid)[0])]
        raise DataError(f'instructions: family {one.family!r} has the "side" train and valid; a family is on one side')
    held_out = hold_out(family, sizes, fraction=recipe.val_fraction, seed=recipe.seed) & ~to_train | to_valid
    starts = np.cumsum([len(source.items) for source in sources])[:-1]
    found = {source.name: part for source, part in zip(sources, np.split(held_out, starts), strict=True)}
    if empty := [name for name, part in found.items() if part.all()]:
        raise DataError(f'instructions {", ".join(empty)}: all are held out; give a "side" to each line, or more families')
    return found


def _kept(items: Sequence[Item], chosen: np.ndarray) -> list[Item]:
    return [item for item, keep in zip(items, chosen, strict=True) if keep]


def _tokenizer(fit_on: Iterable[list[str]], recipe: Recipe, report: Report) -> Tokenizer:
    if recipe.tokenizer:
        return load_tokenizer(recipe.tokenizer)
    report("fit tokenizer", 0, 1)
    rng = np.random.default_rng(recipe.seed)
    chosen: list[str] = []
    for contents in fit_on:
        room = _FIT_CHARACTERS
        for number in rng.permutation(len(contents)).tolist():
            if room <= 0:
                break
            chosen.append(contents[number][:room])
            room -= len(contents[number])
    tokenizer = fit_tokenizer(chosen, vocab_size=recipe.vocab_size)
    report("fit tokenizer", 1, 1)
    return tokenizer


@dataclass(frozen=True)
class _Words:
    """Encodes texts. `images` and `id_of_code_K` are those of a model's vocabulary, and None if codes get the ids after all
    text ids. `file` is the tokenizer to save, and None if it is the model folder's."""

    special: Mapping[str, int]
    encode: Encode
    texts: Ranges
    file: Tokenizer | None = None
    images: Ranges | None = None
    id_of_code_K: np.ndarray | None = None


def _words(fit_on: Iterable[list[str]], recipe: Recipe, image_tokenizer: ImageTokenizer | None, report: Report) -> _Words:
    if image_tokenizer is not None and recipe.tokenizer and Path(recipe.tokenizer).is_dir():
        folder = Path(recipe.tokenizer)
        special, ids_K, texts, images = chameleon_ids(folder, image_tokenizer.codes)
        tokenizer, file = read_tokenizer(folder / TOKENIZER_FILE), None
    else:
        file = tokenizer = _tokenizer(fit_on, recipe, report)
        special, ids_K, texts, images = special_ids(tokenizer), None, ((0, tokenizer.get_vocab_size()),), None
    encode: Encode = partial(encode_texts, tokenizer)
    if recipe.tokenizer:
        problem = f"--tokenizer {recipe.tokenizer}: it fails on a text; give another tokenizer"
        encode = limited(encode, problem, _ENCODE_SECONDS, _ENCODE_MEMORY)
    return _Words(special, encode, texts, file, images, ids_K)


class _Writer:
    """Encodes one source after another, and collects the sources' entries in the manifest."""

    def __init__(self, folder: Path, name: str, words: _Words, recipe: Recipe, report: Report) -> None:
        self._folder, self._name, self._recipe, self._report = folder, name, recipe, report
        self._words, self._special, self._encode = words, words.special, words.encode
        self._text_vocab, self._codes = words.texts[-1][1], 0
        self._codebook: np.ndarray | None = None
        self._image_tokenizer: ImageTokenizer | None = None
        self._sources: dict[str, SourceSection] = {}
        self._figures: Figures = {}
        if words.file is not None:
            words.file.save(str(folder / TOKENIZER_FILE))

    def take_codebook(self, codebook: np.ndarray) -> None:
        """Sets the codebook. Its codes get token ids even if the data set has no pictures."""
        np.save(self._folder / CODEBOOK_FILE, codebook)
        self._codebook, self._codes = codebook, len(codebook)

    def take_image_tokenizer(self, tokenizer: ImageTokenizer) -> None:
        self._image_tokenizer, self._codes = tokenizer, tokenizer.codes
        (self._folder / IMAGE_TOKENIZER).symlink_to(Path(str(self._recipe.image_tokenizer)).resolve())
        if self._words.id_of_code_K is not None:
            np.save(self._folder / CODE_IDS, self._words.id_of_code_K)

    @property
    def _id_of_code(self) -> np.ndarray:
        ids_K = self._words.id_of_code_K
        return self._text_vocab + np.arange(self._codes) if ids_K is None else ids_K

    def add_token_pictures(self, source: Source[Picture], codes_NC: np.ndarray, held_out_N: np.ndarray) -> None:
        """Adds documents of pictures with the given codes."""
        captions = sorted({caption for picture in source.items for caption in picture.captions})
        encoded = dict(zip(captions, self._encode(captions), strict=True))
        splits = {}
        for side, chosen_N in (("train", ~held_out_N), ("valid", held_out_N)):
            made = picture_documents(
                _kept(source.items, chosen_N),
                codes_NC[chosen_N],
                id_of_code_K=self._id_of_code,
                special=self._special,
                captions=encoded,
                caption_first=self._recipe.caption_first,
            )
            splits[side] = self._write(source.name, side, made, with_filler=False)
            self._figures[f"{side}_pictures"] = int(chosen_N.sum())
        self._sources[source.name] = _section(source, splits)

    def add_pictures(self, source: Source[Picture], division: Division) -> None:
        self.take_codebook(division.codebook)
        captions = sorted({caption for picture in source.items for caption in picture.captions})
        coder = self._coder(division.codebook, captions)
        splits = {}
        for side, held, renders in (("train", False, self._recipe.renders), ("valid", True, self._recipe.heldout_renders)):
            chosen = np.flatnonzero(division.held_out_N == held)
            pictures = [source.items[number] for number in chosen.tolist()]
            stage, rasters = f"code {source.name} ({side})", division.rasters_N[chosen]
            documents = coder.documents(pictures, rasters, renders=renders, stage=stage, report=self._report)
            splits[side] = self._write(source.name, side, list(documents), with_filler=True)
            self._figures[f"{side}_pictures"] = len(chosen)
            apart = "families" if self._recipe.hold_out == HoldOut.FAMILIES else "components"
            self._figures[f"{side}_{apart}"] = len(np.unique(division.component_N[chosen]))
        self._figures["psnr_db"] = round(coder.psnr, 3)
        self._sources[source.name] = _section(source, splits)

    def add_texts(self, source: Source[Text], held_out: np.ndarray) -> None:
        splits = {}
        for side, held in (("train", False), ("valid", True)):
            contents = _shown_texts(source.items, held_out != held)
            stage, documents = f"encode {source.name} ({side})", []
            for start in range(0, len(contents), _TEXT_CHUNK):
                for ids in self._encode(contents[start : start + _TEXT_CHUNK]):
                    tokens = np.concatenate([[self._special[BOS]], ids, [self._special[EOS]]])
                    documents.append(Document(tokens, np.zeros(len(tokens), bool)))
                self._report(stage, min(start + _TEXT_CHUNK, len(contents)), len(contents))
            splits[side] = self._write(source.name, side, documents, with_filler=False)
        self._sources[source.name] = _section(source, splits)

    def add_instructions(self, source: Source[Instruction], held_out: np.ndarray) -> None:
        """Adds documents of a picture, the prompt, a space and the answer. Only the answer and the end token are labels."""
        pictured = [each for each in source.items if each.image is not None]
        if pictured and self._codebook is None and self._image_tokenizer is None:
            raise ConfigError(
                f"--instructions {source.name}: {len(pictured)} lines have an image, but there is no codebook; give "
                "the one of the model's data: --codebook DATA/codebook.npy --tokenizer DATA/tokenizer.json"
            )
        splits = {}
        for side, chosen in (("train", ~held_out), ("valid", held_out)):
            instructions = _kept(source.items, chosen)
            prompts = self._encode([each.prompt for each in instructions])
            answers = self._encode([f" {each.answer}" for each in instructions])
            documents = []
            for each, prompt, answer in zip(instructions, prompts, answers, strict=True):
                image, filler = _NOTHING if each.image is None else self._picture(each.image)
                read = np.concatenate([[self._special[BOS]], image, prompt])
                tokens = np.concatenate([read, answer, [self._special[EOS]]])
                is_filler = np.zeros(len(tokens), bool)
                is_filler[1 : 1 + len(filler)] = filler
                documents.append(Document(tokens, is_filler, np.arange(len(tokens)) < len(read)))
            self._report(f"encode {source.name} ({side})", 1, 1)
            splits[side] = self._write(source.name, side, documents, with_filler=bool(pictured))
        self._sources[source.name] = _section(source, splits)

    def _picture(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids of a picture, marks included, and for each whether it is filler."""
        if self._image_tokenizer is not None:
            codes = self._id_of_code[codes_of(path, self._image_tokenizer)]
            image = np.concatenate([[self._special[BOI]], codes, [self._special[EOI]]])
            return image, np.zeros(len(image), bool)
        assert self._codebook is not None
        return self._coder(self._codebook, []).image(rasterise(path))

    def _coder(self, codebook: np.ndarray, captions: Sequence[str]) -> PictureCoder:
        return PictureCoder(
            codebook=codebook,
            first_code=self._text_vocab,
            special=self._special,
            captions=dict(zip(captions, self._encode(captions), strict=True)),
            recipe=self._recipe,
        )

    def finish(self) -> tuple[Manifest, Figures]:
        self._report("count baselines", 0, 1)
        special = self._special
        marks: Any = {"begin_id": special[BOI], "end_id": special[EOI]}
        if (tokenizer := self._image_tokenizer) is not None:
            ids = None if self._words.id_of_code_K is None else CODE_IDS
            of_tokenizer: Any = {"vq_model": IMAGE_TOKENIZER, "vq_digest": tokenizer.digest, "code_ids": ids}
            image = ImageSection(grid=tokenizer.grid, **marks, **of_tokenizer)
        else:
            image = ImageSection(grid=(GRID, GRID), **marks, codebook=CODEBOOK_FILE)
        manifest = Manifest(
            name=self._name,
            vocab_size=max(end for ranges in self._modalities().values() for _, end in ranges),
            modalities=self._modalities(),
            pad_id=special[PAD],
            eos_id=special[EOS],
            tokenizer=None if self._words.file is None else TOKENIZER_FILE,
            image=image if self._codes else None,
            sources=self._sources,
        )
        baselines = {key: round(nats, 6) for key, nats in count_baselines(self._folder, manifest).items()}
        manifest = manifest.model_copy(update={"baselines": baselines})
        write_manifest(manifest, self._folder)
        self._report("count baselines", 1, 1)
        return manifest, self._figures

    def _write(self, source: str, side: str, documents: Iterable[Document], *, with_filler: bool) -> SplitSection | None:
        path, modalities = f"{source}_{side}", self._modalities()
        return write_split(self._folder, path, documents, modalities=modalities, with_filler=with_filler)

    def _modalities(self) -> dict[str, tuple[tuple[int, int], ...]]:
        images = self._words.images or ((self._text_vocab, self._text_vocab + self._codes),)
        return {"text": self._words.texts} | ({"image": images} if self._codes else {})


def write_split(
    folder: Path,
    path: str,
    documents: Iterable[Document],
    *,
    modalities: Mapping[str, tuple[tuple[int, int], ...]],
    with_filler: bool,
) -> SplitSection | None:
    """Writes one split: <folder>/<path>.bin and .idx, and the files of filler and prompt bits. Returns the split's section
    of the manifest, or None if there is no document. Keeps one document and two bytes per token in memory. `modalities` are
    id ranges as in the manifest."""
    documents = iter(documents)
    first = next(documents, None)
    if first is None:
        return None
    prefix, vocab_size = folder / path, max(end for ranges in modalities.values() for _, end in ranges)
    filler: list[np.ndarray] = []
    prompts: list[np.ndarray] = []
    lengths: list[int] = []
    pictures: list[Sequence[PictureRef]] = []

    def tokens() -> Iterator[np.ndarray]:
        for document in chain([first], documents):
            lengths.append(len(document.tokens))
            filler.extend([document.filler] if with_filler else [])
            prompts.extend([] if document.prompt is None else [document.prompt])
            pictures.append(document.pictures)
            yield document.tokens

    write_indexed(prefix, tokens(), vocab_size=vocab_size)
    return SplitSection(
        path=path,
        documents=len(lengths),
        tokens=sum(lengths),
        tokens_by_modality=count_by_modality(prefix, modalities),
        filler=_write_bits(folder, f"{path}_filler.npy", filler),
        prompt=_write_bits(folder, f"{path}_prompt.npy", prompts),
        pictures=write_refs(folder, f"{path}_pictures", pictures),
    )


def _write_bits(folder: Path, file: str, bits: Sequence[np.ndarray]) -> str | None:
    if not bits:
        return None
    np.save(folder / file, np.packbits(np.concatenate(bits)))
    return file


def _section(source: Source[Any], splits: dict[str, SplitSection | None]) -> SourceSection:
    train = splits["train"]
    assert train is not None  # `hold_out` leaves training data, and a source without training instructions is an error
    return SourceSection(train=train, valid=splits["valid"], licence=source.licence, attribution=source.attribution)
