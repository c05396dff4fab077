"""Defines the sources of a data set before encoding: pictures with captions, texts and instructions."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Generic, TypeVar

from moe_dist.data.chat_turns import Turns
from moe_dist.errors import DataError

Skip = Callable[[DataError], None]  # called with the reason why an input is unreadable; returns to omit it, or raises
VARIATIONS = ("place", "flip", "background")  # properties in which augmented copies may differ; place means scale and shift
Item = TypeVar("Item")


def refuse(error: DataError) -> None:
    """A `Skip` that never omits an input, but raises the error."""
    raise error


class HoldOut(StrEnum):
    """The kind of pictures that are held out: whole families, or single pictures (variants) of families that stay in
    training. No training picture is near-equal to a held-out variant."""

    FAMILIES = "families"
    VARIANTS = "variants"


@dataclass(frozen=True)
class Picture:
    """A picture with captions."""

    key: str  # unique within the source; seeds the picture's random augmentation
    family: str  # the pictures of a family are all in training or all held out, except with HoldOut.VARIANTS
    path: Path  # PNG or JPEG, or an SVG of OpenMoji
    captions: tuple[str, ...]  # such as the picture's name in several languages; may be empty


@dataclass(frozen=True)
class Text:
    """A text. The texts of a family, such as equal texts, are all in training or all held out."""

    key: str
    family: str
    content: str


@dataclass(frozen=True)
class Instruction:
    """A prompt and its answer."""

    family: str  # the instructions of a family are all in training or all held out
    prompt: str  # the prompt's tokens are inputs, but not labels
    answer: str
    image: Path | None = None  # picture before the prompt
    side: str = ""  # train or valid; '' if the random split decides


@dataclass(frozen=True)
class Source(Generic[Item]):
    """One source of documents, before the documents are encoded."""

    name: str
    items: tuple[Item, ...]
    licence: str
    attribution: str = ""


@dataclass(frozen=True)
class Corpus:
    """All sources of a data set."""

    pictures: Source[Picture] | None = None
    texts: tuple[Source[Text], ...] = ()
    instructions: tuple[Source[Instruction], ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Settings for the split into training and held-out data, and for the encoding of the sources."""

    seed: int = 0  # seed of the split, the augmentation and the codebook
    renders: int = 10  # number of augmented copies of each training picture; each copy is a document
    heldout_renders: int = 5  # number of augmented copies of each held-out picture
    val_fraction: float = 0.1  # held-out fraction of the pictures, and of each text source's characters
    vocab_size: int = 4096  # number of tokens of the BPE, special tokens included
    codes: int = 512  # number of entries in the codebook
    # path of a tokenizer.json that `fit_tokenizer` made, or of a Hugging Face folder; None fits a tokenizer
    tokenizer: str | None = None
    chat_template: str | None = None  # path of a chat template to use; None uses the Hugging Face folder's template
    turns: Turns = Turns.LAST  # the turns to train on if the chat template rewrites earlier turns
    most_tokens: int | None = None  # largest number of tokens of a row with pictures; longer rows are errors
    skip_bad: bool = False  # True omits rows that cannot be encoded
    image_tokenizer: str | None = None  # folder of a VQ model that encodes pictures in place of a codebook
    codebook: str | None = None  # path of a codebook.npy to use; None fits a codebook
    hold_out: HoldOut = HoldOut.FAMILIES
    vary: tuple[str, ...] = VARIATIONS  # properties in which the augmented copies of a picture differ
    caption_first: float = 0.5  # fraction of documents whose caption is before the picture


def content_family(content: bytes) -> str:
    """Returns a family name that depends only on an item's bytes, so that items with equal bytes are one family."""
    return hashlib.sha256(content).hexdigest()
