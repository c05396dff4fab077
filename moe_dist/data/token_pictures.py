"""Makes documents of pictures that the user's image tokenizer encodes. A picture is encoded once, without augmentation.
Each of its captions gives a document with the caption before the picture, and one with the caption after it.

Shape letters: N pictures, C codes of a picture, K codes of the tokenizer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from moe_dist.config.json_text import read_json
from moe_dist.data.corpus import HoldOut, Picture, Recipe, Skip, Source
from moe_dist.data.families import hold_out, join
from moe_dist.data.image_tokenizer import GUIDE, ImageTokenizer
from moe_dist.data.picture_coding import Document
from moe_dist.data.picture_encoder import FORMATS
from moe_dist.data.picture_files import read_part
from moe_dist.data.pictures import decoded, rasterise
from moe_dist.data.tokenizer import BOI, BOS, EOI, EOS, PAD
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.tokenizer_file import MAX_BYTES
from moe_dist.runtime.progress import Report

Ranges = tuple[tuple[int, int], ...]
# Chameleon's names of the tokens that this project's tokenizers have, too.
_CHAMELEON = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", BOI: "<racm3:break>", EOI: "<eoss>"}
_UNUSED = ("codebook", "codes", "renders", "heldout_renders", "vary")  # recipe fields of the fitted codebook


def check_options(recipe: Recipe) -> None:
    """Raises ConfigError for options that have no effect with an image tokenizer."""
    given = [name for name in _UNUSED if getattr(recipe, name) != getattr(Recipe, name)]
    given += ["hold_out"] if recipe.hold_out != HoldOut.FAMILIES else []
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{options}: does not apply with --image-tokenizer; leave it out", see=GUIDE)


def read_pictures(
    source: Source[Picture], tokenizer: ImageTokenizer, report: Report, skip: Skip
) -> tuple[Source[Picture], np.ndarray]:
    """Encodes all pictures. Returns the readable ones, and their codes, int64 [N, C]. Raises DataError if none can be read,
    or if `skip` raises for a damaged picture."""
    found: list[tuple[Picture, np.ndarray]] = []
    damaged: list[DataError] = []
    for number, picture in enumerate(source.items):
        try:
            found.append((picture, codes_of(picture.path, tokenizer)))
        except DataError as error:
            skip(error)
            damaged.append(error)
        report(f"encode {source.name}", number + 1, len(source.items))
    if not found:
        raise DataError(f"none of {len(source.items)} pictures can be read; the first: {damaged[0]}")
    readable, codes = zip(*found, strict=True)
    return replace(source, items=readable), np.stack(codes)


def codes_of(path: Path, tokenizer: ImageTokenizer) -> np.ndarray:
    """Returns the codes of the picture in a file, int64 [C]. Raises DataError if it is damaged."""
    return tokenizer.encode(open_picture(path))


def open_picture(path: Path) -> Image.Image:
    """Reads a picture. Raises DataError if it is damaged."""
    if path.suffix == ".svg":  # of OpenMoji
        return Image.fromarray(rasterise(path, svg=True))
    return decoded(read_part(path.parent, path.name), repr(str(path)), FORMATS)


def held_out(pictures: Sequence[Picture], codes_NC: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Returns a mask of the held-out pictures, bool [N]. Pictures of a family, or with equal codes, are on one side."""
    first: dict[bytes, int] = {}
    equal = [(first.setdefault(codes.tobytes(), number), number) for number, codes in enumerate(codes_NC)]
    component_N = join([picture.family for picture in pictures], equal)
    return hold_out(component_N, np.ones(len(pictures), np.int64), fraction=recipe.val_fraction, seed=recipe.seed)


def documents(
    pictures: Sequence[Picture],
    codes_NC: np.ndarray,
    *,
    id_of_code_K: np.ndarray,
    special: Mapping[str, int],
    captions: Mapping[str, np.ndarray],
    caption_first: float,
) -> Iterator[Document]:
    """Yields the documents of each picture. `captions` has the token ids of each caption. With `caption_first` 0 or 1, all
    captions are after or before the picture."""
    orders = [0] if caption_first == 1 else [1] if caption_first == 0 else [0, 1]
    for picture, codes_C in zip(pictures, codes_NC, strict=True):
        image = [np.array([special[BOI]]), id_of_code_K[codes_C], np.array([special[EOI]])]
        found = [captions[each] for each in picture.captions] or [np.empty(0, np.int64)]
        for caption in found:
            for order in orders if picture.captions else [0]:
                parts = [*image, caption] if order else [caption, *image]
                tokens = np.concatenate([[special[BOS]], *parts, [special[EOS]]])
                yield Document(tokens, np.zeros(len(tokens), bool))


def chameleon_ids(folder: Path, codes: int) -> tuple[dict[str, int], np.ndarray, Ranges, Ranges]:
    """Returns the ids of special tokens, the id of each code, int64 [K], and the ranges of the ids of texts and of
    pictures, in the vocabulary of a Chameleon folder. Raises ConfigError if it is none, or has another number of codes."""
    from transformers.models.chameleon.modeling_chameleon import ChameleonImageVocabularyMapping

    try:
        fields = read_json(folder / "config.json", most_bytes=MAX_BYTES)
        names = fields["vocabulary_map"]
        special = {ours: int(names[theirs]) for ours, theirs in _CHAMELEON.items()}
        id_of_code = ChameleonImageVocabularyMapping(names).img2bpe
        ids_K = np.array([id_of_code[code] for code in range(codes)], np.int64)
        first, end, size = int(ids_K.min()), int(ids_K.max()) + 1, int(fields["vocab_size"])
        if len(set(ids_K.tolist())) != codes or end - first != codes or not 0 <= first < end <= size:
            raise ValueError(f"{codes} codes have the ids {first} to {end - 1} of {size}")
        if len(id_of_code) != codes:
            raise ValueError(f"it names {len(id_of_code)} picture tokens, and the image tokenizer has {codes}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--tokenizer {folder}: its vocabulary_map names no tokens for these codes ({error!r:.200}); with "
            "--image-tokenizer give the folder of a Chameleon for both, or no --tokenizer",
            see=GUIDE,
        ) from error
    return special, ids_K, tuple((a, b) for a, b in ((0, first), (end, size)) if a < b), ((first, end),)
