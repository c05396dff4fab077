"""Decides which token may come next. A picture consists of a start mark, a fixed number of codes and an end mark. All other
tokens are text.

The training data follow this grammar (`moe_dist/data/picture_coding.py`). Generated tokens must follow the grammar too,
because a picture with a missing code cannot be decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest

IMAGE = "image"


class GrammarState(IntEnum):
    """The kinds of tokens that may come next. CODE: a code of a picture. END_OF_PICTURE: a picture's end mark."""

    TEXT = 0  # text, the end of the document, or the start mark of a picture
    TEXT_ONLY = 1  # text or the end of the document, because a picture would need too many tokens
    CODE = 2
    END_OF_PICTURE = 3


@dataclass(frozen=True)
class Grammar:
    """The rules for a data set's token ids: which ids are text, codes or marks, and which ids may come next."""

    modality_of_id: np.ndarray  # int64 [V], index into `modalities` for each token id; -1 for an id without modality
    modalities: tuple[str, ...]  # names of the modalities, in the manifest's order
    eos_id: int  # id of the token that ends a document
    begin_id: int | None  # id of the start mark of a picture; None if the data have no pictures
    end_id: int | None  # id of the end mark of a picture
    cells: int  # number of codes in a picture; 0 if the data have no pictures
    allowed_SV: np.ndarray  # bool [4, V], for each state (S) whether it allows the id (V)

    def state(self, tokens: Sequence[int], room: int) -> GrammarState:
        """Returns the state after the tokens `tokens`. At most `room` more tokens may follow."""
        if self.begin_id is not None and self.begin_id in tokens:
            since = list(reversed(tokens)).index(self.begin_id)  # number of tokens after the last start mark
            if since < self.cells:
                return GrammarState.CODE
            if since == self.cells:
                return GrammarState.END_OF_PICTURE
        return GrammarState.TEXT if self.cells and room >= self.cells + 2 else GrammarState.TEXT_ONLY  # + 2 for both marks

    def pictures(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """Returns the codes of each complete picture in `tokens`, int64 [cells], as indices into the codebook."""
        first = int(np.flatnonzero(self.allowed_SV[GrammarState.CODE])[0]) if self.cells else 0
        found = []
        for place, token in enumerate(tokens):
            inside = np.array(tokens[place + 1 : place + 1 + self.cells], np.int64)
            if token == self.begin_id and len(inside) == self.cells and self.allowed_SV[GrammarState.CODE][inside].all():
                found.append(inside - first)
        return found

    def text(self, tokens: Sequence[int]) -> list[int]:
        """Returns the text tokens in `tokens`. Leaves out the codes and marks of pictures, and the document's end mark."""
        return [t for t in tokens if self.allowed_SV[GrammarState.TEXT_ONLY][t] and t != self.eos_id]


def grammar_of(manifest: Manifest, *, vocab_size: int, never: Sequence[int] = ()) -> Grammar:
    """Makes the grammar of a data set.

    Args:
        vocab_size: Number of token ids of the model. Ids that the data set does not define are never drawn.
        never: Ids that are never drawn, because they occur in data only as the first token of a document.

    Raises:
        ConfigError: the manifest describes pictures, but has no modality with the name `image`.
    """
    image, modalities = manifest.image, tuple(manifest.modalities)
    if image is not None and IMAGE not in modalities:
        raise ConfigError(
            f"the data's modalities are {', '.join(modalities)}: pictures are those of {IMAGE!r}; rename it so"
        )
    modality_of_id = np.full(vocab_size, -1, np.int64)
    for index, ranges in enumerate(manifest.modalities.values()):
        for first, end in ranges:
            modality_of_id[first:end] = index
    is_code = modality_of_id == (modalities.index(IMAGE) if image is not None else -2)
    text = (modality_of_id >= 0) & ~is_code
    text[[manifest.pad_id, *never]] = False
    text[manifest.eos_id] = True  # allowed even if pad_id and eos_id are the same id
    allowed = np.zeros((len(GrammarState), vocab_size), bool)
    if image is not None:
        text[[image.begin_id, image.end_id]] = False
        allowed[GrammarState.CODE] = is_code
        allowed[GrammarState.END_OF_PICTURE, image.end_id] = True
    allowed[[GrammarState.TEXT, GrammarState.TEXT_ONLY]] = text
    if image is not None:
        allowed[GrammarState.TEXT, image.begin_id] = True
    return Grammar(
        modality_of_id=modality_of_id,
        modalities=modalities,
        eos_id=manifest.eos_id,
        begin_id=None if image is None else image.begin_id,
        end_id=None if image is None else image.end_id,
        cells=0 if image is None else image.grid[0] * image.grid[1],
        allowed_SV=allowed,
    )
