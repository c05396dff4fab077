"""The sources of a data set before encoding: pictures with captions, texts and instructions."""

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

VARIATIONS = ("place", "flip", "background")  # place is scale and shift


class HoldOut(StrEnum):
    """What is held out: whole families of pictures; or single variants, none close to a training picture, of families that
    are trained on."""

    FAMILIES = "families"
    VARIANTS = "variants"


@dataclass(frozen=True)
class Picture:
    """Attributes:
    key: Name of the picture, unique in its source; seeds the random draws of its renders.
    family: Pictures of one family go to the same side of the split, unless variants are held out.
    path: SVG, or any file that Pillow reads.
    captions: Captions, e.g. in several languages; may be empty.
    """

    key: str
    family: str
    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """Attributes: key: Name of the text. family: As of a picture. content: The text."""

    key: str
    family: str
    content: str


@dataclass(frozen=True)
class Instruction:
    """Attributes:
    family: As of a picture.
    prompt: Read but not scored.
    answer: Scored.
    image: A picture that stands before the prompt.
    side: train or valid; empty to let the split decide.
    """

    family: str
    prompt: str
    answer: str
    image: Path | None = None
    side: str = ""


@dataclass(frozen=True)
class PictureSource:
    name: str
    pictures: tuple[Picture, ...]
    licence: str
    attribution: str = ""


@dataclass(frozen=True)
class TextSource:
    name: str
    texts: tuple[Text, ...]
    licence: str
    attribution: str = ""


@dataclass(frozen=True)
class InstructionSource:
    name: str
    instructions: tuple[Instruction, ...]
    licence: str


@dataclass(frozen=True)
class Corpus:
    """All sources of a data set."""

    pictures: PictureSource | None = None
    texts: tuple[TextSource, ...] = ()
    instructions: tuple[InstructionSource, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Settings by which the sources become tokens.

    Attributes:
        seed: Seed of the split, the renders and the codebook.
        renders: Augmented renders of each training picture, each a document.
        heldout_renders: Likewise for each held-out picture.
        val_fraction: Share of pictures, and of each text source's characters, on the held-out side.
        vocab_size: Tokens of the BPE, special ones included.
        codes: Entries of the codebook.
        tokenizer: A tokenizer.json to use instead of fitting one.
        codebook: A codebook.npy to use instead of fitting one.
        hold_out: Which pictures are held out.
        vary: The `VARIATIONS` in which the renders of a picture differ.
        caption_first: Share of a picture's documents that have the caption before the picture.
    """

    seed: int = 0
    renders: int = 10
    heldout_renders: int = 5
    val_fraction: float = 0.1
    vocab_size: int = 4096
    codes: int = 512
    tokenizer: str | None = None
    codebook: str | None = None
    hold_out: HoldOut = HoldOut.FAMILIES
    vary: tuple[str, ...] = VARIATIONS
    caption_first: float = 0.5


def content_family(content: bytes) -> str:
    """The family of an item known only by its bytes: equal bytes are one family."""
    return hashlib.sha256(content).hexdigest()
