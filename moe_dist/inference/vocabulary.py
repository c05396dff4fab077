"""Encodes texts and pictures as prompts, and decodes tokens. Uses a data set's tokenizer and codebook."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from moe_dist.data.codebook import GRID, decode, encode, load_codebook, to_patches
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.pictures import plain, rasterise
from moe_dist.data.tokenizer import BOS, load_tokenizer, special_ids
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest
from moe_dist.formats.numpy_file import load_array
from moe_dist.formats.tokenizer_file import limited, read_tokenizer
from moe_dist.inference.grammar import Grammar, grammar_of

if TYPE_CHECKING:
    from moe_dist.data.image_tokenizer import ImageTokenizer

_FAILS = "the tokenizer fails on a text; give another one"
_SMALLEST = 256  # pixels of a side of a PNG file


@dataclass(frozen=True)
class HeldoutPicture:
    """The first picture of a document. The document is held out, unless `pictured` reads training documents."""

    caption: str  # the document's text
    codes: np.ndarray  # int64 [cells], indices into the codebook


class Vocabulary:
    """Encodes and decodes texts and pictures of one data set. `vocab_size` is the number of token ids of the model. If the
    manifest names no tokenizer, texts are encoded by the tokenizer.json of `model_folder`, special tokens included."""

    def __init__(self, folder: str | Path, manifest: Manifest, *, vocab_size: int, model_folder: str | None = None) -> None:
        self._folder, self._manifest, self._vocab_size = Path(folder), manifest, vocab_size
        self._of_model = None if manifest.tokenizer or model_folder is None else Path(model_folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer. Raises ConfigError if the data set has no tokenizer, and DataError if the tokenizer is
        damaged."""
        if self._of_model is not None:
            return read_tokenizer(self._of_model / "tokenizer.json")
        if self._manifest.tokenizer is None:
            raise ConfigError(
                f"data set {self._folder}: its manifest names no tokenizer, so that text can neither be read nor written; "
                "add the file to the folder and `tokenizer` to the manifest (docs/data.md)"
            )
        return load_tokenizer(self._folder / self._manifest.tokenizer)

    @cached_property
    def codebook(self) -> np.ndarray:
        """Returns the picture patch of each code, as RGB values, uint8 [codes, patch, patch, 3].

        Raises:
            ConfigError: the data set has no pictures or no codebook, or its pictures have a different grid of codes.
            DataError: the codebook is damaged.
        """
        image = self._manifest.image
        if image is None or image.codebook is None:
            raise ConfigError(
                f"data set {self._folder}: its manifest has no {'image' if image is None else 'image.codebook'}: pictures "
                "can be neither read nor drawn; train on data with pictures, as `moe-dist prepare-data` makes them"
            )
        if image.grid != (GRID, GRID):
            raise ConfigError(
                f"data set {self._folder}: image.grid={image.grid}, but pictures are of {GRID} x {GRID} codes"
            )
        return load_codebook(self._folder / image.codebook)

    @property
    def has_codebook(self) -> bool:
        """Returns whether the data set has a codebook or an image tokenizer, without which pictures cannot be encoded or
        decoded."""
        image = self._manifest.image
        return image is not None and (image.codebook is not None or image.vq_model is not None)

    @cached_property
    def image_tokenizer(self) -> "ImageTokenizer | None":
        """Returns the image tokenizer of the data set; None if pictures have a codebook. Raises ConfigError if it is
        missing, or not the one that encoded the pictures."""
        image = self._manifest.image
        if image is None or image.vq_model is None:
            return None
        from moe_dist.data.image_tokenizer import ImageTokenizer  # imported only here, because it takes seconds

        link = self._folder / image.vq_model
        if not link.is_dir():
            raise ConfigError(f"{link}: the folder of the image tokenizer is gone; let the link lead to where it is now")
        found = ImageTokenizer(link)
        if found.digest != image.vq_digest:
            raise ConfigError(
                f"{link}: is not the image tokenizer that encoded the pictures; let the link lead to that one"
            )
        return found

    def check_draws(self) -> None:
        """Raises ConfigError if the data set's pictures cannot be drawn, because there is neither a codebook nor a
        tokenizer with a decoder."""
        if self.image_tokenizer is None:
            _ = self.codebook
        else:
            self.image_tokenizer.check_decodes()

    @cached_property
    def _code_of_id(self) -> np.ndarray | None:
        """The image tokenizer's code of each id of the modality `image`, in the order of ids. None: the same order."""
        image = self._manifest.image
        if image is None or image.code_ids is None:
            return None
        return load_array(self._folder / image.code_ids).argsort()

    def drawn(self, codes: np.ndarray) -> Image.Image:
        """Returns the picture that the codes describe."""
        if self.image_tokenizer is None:
            return picture_of(codes, self.codebook)
        codes = codes if self._code_of_id is None else self._code_of_id[codes]
        return Image.fromarray(self.image_tokenizer.decode(codes[None])[0])

    @cached_property
    def grammar(self) -> Grammar:
        """Returns the grammar of the data set."""
        return grammar_of(self._manifest, vocab_size=self._vocab_size, never=self._begin)

    @property
    def _begin(self) -> list[int]:
        return [] if self._of_model is not None else [special_ids(self.tokenizer)[BOS]]

    def text_prompt(self, text: str) -> list[int]:
        """Returns the beginning of a document with `text`: the begin mark and the tokens of `text`."""
        if self._of_model is not None:
            return self._encode(text, True)
        return [*self._begin, *self.tokens(text)]

    def tokens(self, text: str) -> list[int]:
        """Returns the tokens of `text`, without special tokens before or after it."""
        return self._encode(text, False)

    @cached_property
    def _encode(self) -> Callable[[str, bool], list[int]]:
        tokenizer = self.tokenizer
        return limited(lambda text, ends: tokenizer.encode(text, add_special_tokens=ends).ids, _FAILS)

    @cached_property
    def _decode(self) -> Callable[[list[int], bool], str]:
        return limited(self.tokenizer.decode, _FAILS)

    def drawing_prompt(self, caption: str) -> list[int]:
        """Returns the beginning of a document that consists of `caption` and the start mark of a picture."""
        image = self._manifest.image
        assert image is not None, "the codebook was loaded, so there are pictures"
        return [*self.text_prompt(caption), image.begin_id]

    def caption_prompt(self, codes: np.ndarray, beginning: str = "") -> list[int]:
        """Returns the beginning of a document that consists of a picture and the beginning of its caption, `beginning`."""
        return [*self._begin, *self.picture(codes), *self.text_prompt(beginning)[len(self._begin) :]]

    def picture(self, codes: np.ndarray) -> list[int]:
        """Returns the tokens of a picture, including its start mark and end mark."""
        image = self._manifest.image
        assert image is not None, "the codebook was loaded, so there are pictures"
        ids = (codes + np.flatnonzero(self.grammar.modality_of_id == self._image)[0]).tolist()
        return [image.begin_id, *ids, image.end_id]

    @property
    def _image(self) -> int:
        return self.grammar.modalities.index("image")

    def text(self, tokens: Sequence[int]) -> str:
        """Decodes the text tokens in `tokens`; pictures are left out. Invalid UTF-8 becomes the replacement character."""
        return self._decode(list(self.grammar.text(tokens)), False)

    def read_picture(self, path: Path) -> np.ndarray:
        """Returns the codes of the picture in a file. The picture is drawn on white, without the random changes that are
        made to training pictures.

        Raises:
            ConfigError: the file does not exist.
            DataError: the file is damaged or of an unknown format.
        """
        if not path.is_file():
            raise ConfigError(f"--picture {path}: no such file; give a PNG or JPEG, or the number of a held-out picture")
        if self.image_tokenizer is not None:
            from moe_dist.data.token_pictures import open_picture

            codes = self.image_tokenizer.encode(open_picture(path))
            return codes if self._code_of_id is None else self._code_of_id.argsort()[codes]
        return encode(to_patches(plain(rasterise(path)).pixels[None]), self.codebook).astype(np.int64)

    def heldout(self) -> list[HeldoutPicture]:
        """Returns the first picture of each held-out document that has a picture, in the order of the data. Raises
        ConfigError if no held-out document has a picture."""
        found = list(self.pictured("valid"))
        if not found:
            raise ConfigError(f"data set {self._folder}: no held-out document has a picture")
        return found

    def pictured(self, side: Literal["train", "valid"], *, most: int | None = None) -> Iterator[HeldoutPicture]:
        """Yields the first picture of each training (`train`) or held-out (`valid`) document that has a picture, in the
        order of the data. Reads only about `most` documents per source, evenly spaced; None reads all."""
        for source in self._manifest.sources.values():
            section = source.train if side == "train" else source.valid
            if section is None or not section.tokens_by_modality.get("image", 1):
                continue
            split = IndexedSplit(self._folder, section)
            stride = 1 if most is None else -(-len(split.starts_D) // most)
            for start, length in zip(split.starts_D[::stride].tolist(), split.lengths_D[::stride].tolist(), strict=True):
                tokens = split.tokens(start, length).tolist()
                pictures = self.grammar.pictures(tokens)
                if pictures:
                    yield HeldoutPicture(self.text(tokens), pictures[0])


def picture_of(codes: np.ndarray, codebook: np.ndarray) -> Image.Image:
    """Returns the picture that the codes `codes` describe, with 32 x 32 pixels."""
    return Image.fromarray(decode(codes[None], codebook)[0])


def png(picture: Image.Image) -> bytes:
    """Returns the content of a PNG file with the picture, enlarged to at least `_SMALLEST` pixels a side."""
    buffer, scale = io.BytesIO(), max(1, _SMALLEST // picture.width)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()
