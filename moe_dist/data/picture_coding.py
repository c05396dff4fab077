"""Turns pictures into documents: splits them by family, fits the codebook on training pictures, and encodes augmented
copies.

Pictures are near-equal if their grids of codes differ in few cells. Near-equal pictures must be on one side of the split,
but the codebook that gives the codes must be fitted on training pictures only. Therefore two codebooks are fitted. The
provisional codebook is fitted on all pictures. Pictures with near-equal provisional codes join one family, the families are
split, and the provisional codebook is discarded. The final codebook is fitted on augmented training pictures. If a held-out
picture's final codes are near-equal to those of a training picture, its family moves to training. Then no held-out picture
is near-equal to a training picture under either codebook. With `HoldOut.VARIANTS`, single pictures are split and moved
instead of families.

Shape letters: N pictures, C cells of a grid of codes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_dist.data.codebook import GRID, decode, encode, fit, load_codebook, to_patches
from moe_dist.data.corpus import HoldOut, Picture, Recipe, Skip, refuse
from moe_dist.data.families import hold_out, join, near_pairs, variants
from moe_dist.data.picture_files import PictureRef
from moe_dist.data.pictures import Render, augmented, plain, rasterise
from moe_dist.data.tokenizer import BOI, BOS, EOI, EOS
from moe_dist.errors import ConfigError, DataError
from moe_dist.runtime.progress import Report

NEAR_CELLS = 8  # grids that differ in at most this many of their 64 cells are near-equal
_FIT_RENDERS = 4000  # number of pictures for fitting the codebook; they have 256,000 patches and take 3 s
_CHUNK = 64  # number of pictures that are encoded at once


@dataclass(frozen=True)
class Division:
    """The division of the pictures into a training side and a held-out side."""

    rasters_N: np.ndarray  # uint8 RGBA [N, RASTER, RASTER, 4]
    component_N: np.ndarray  # int64; pictures with equal numbers must be on one side (a family, or near-equal pictures)
    held_out_N: np.ndarray  # bool, true if the picture is held out; equal within a component
    codebook: np.ndarray  # uint8 [codes, PATCH, PATCH, 3], fitted on training pictures


@dataclass(frozen=True)
class Document:
    """The tokens of a document. All arrays have one element per token."""

    tokens: np.ndarray  # int64
    filler: np.ndarray  # bool, true if the token is filler (a picture cell that shows only background)
    prompt: np.ndarray | None = None  # bool, true if the token is never a label; None if all tokens are labels
    pictures: Sequence[PictureRef] = ()  # the pictures of the document's placeholder tokens, in order


def rasterise_all(
    pictures: Sequence[Picture], report: Report, skip: Skip = refuse
) -> tuple[tuple[Picture, ...], np.ndarray]:
    """Rasterises pictures. Returns the readable pictures and their rasters, uint8 RGBA [N, RASTER, RASTER, 4]. Raises
    DataError if no picture can be read, or if `skip` raises for an unreadable picture."""
    found: list[tuple[Picture, np.ndarray]] = []
    damaged: list[DataError] = []
    for number, picture in enumerate(pictures):
        try:
            found.append((picture, rasterise(picture.path, svg=picture.path.suffix == ".svg")))
        except DataError as error:
            skip(error)
            damaged.append(error)
        report("rasterise pictures", number + 1, len(pictures))
    if not found:
        raise DataError(f"none of {len(pictures)} pictures can be read; the first: {damaged[0]}")
    readable, rasters = zip(*found, strict=True)
    return readable, np.stack(rasters)


def divide(pictures: Sequence[Picture], rasters: np.ndarray, recipe: Recipe, report: Report) -> Division:
    """Splits pictures by family and near-equality, and fits or loads the codebook (see the module docstring). Raises
    ConfigError if single pictures are to be held out, but each picture is alone in its family or near-equal to a training
    picture."""
    report("split families", 0, 2)
    plain_patches = to_patches(np.stack([plain(raster).pixels for raster in rasters]))
    mirrored_patches = to_patches(np.stack([plain(raster, mirrored=True).pixels for raster in rasters]))

    def joined(keys: Sequence[object], codebook: np.ndarray) -> np.ndarray:
        # Augmentation flips pictures at random. Two pictures therefore count as near-equal also if one of them is
        # near-equal to the mirror image of the other.
        grids_NC = encode(plain_patches, codebook).reshape(-1, GRID * GRID)
        mirrored_NC = encode(mirrored_patches, codebook).reshape(-1, GRID * GRID)
        near = near_pairs(grids_NC, grids_NC, most=NEAR_CELLS) + near_pairs(grids_NC, mirrored_NC, most=NEAR_CELLS)
        return join(keys, near)

    distinct = len(np.unique(plain_patches, axis=0))
    provisional = fit(plain_patches, codes=min(recipe.codes, distinct), seed=recipe.seed)
    families = [picture.family for picture in pictures]
    component_N = joined(families if recipe.hold_out == HoldOut.FAMILIES else range(len(pictures)), provisional)
    held_out_N = _drawn(families, component_N, recipe)
    report("split families", 1, 2)
    codebook = load_codebook(recipe.codebook) if recipe.codebook else _fit_on(pictures, rasters, ~held_out_N, recipe)
    component_N = joined(component_N.tolist(), codebook)
    held_out_N &= ~np.isin(component_N, component_N[~held_out_N])
    if recipe.hold_out == HoldOut.VARIANTS and recipe.val_fraction > 0 and not held_out_N.any():
        raise ConfigError(
            "--hold-out variants: no picture has a variant in training without being close to a training picture; hold out "
            "families, the default (docs/data.md)"
        )
    report("split families", 2, 2)
    return Division(rasters, component_N, held_out_N, codebook)


def _drawn(families: Sequence[str], component_N: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Returns a mask of the pictures that are held out before the comparison by the final codebook, bool [N]. They are the
    fraction `val_fraction` of all pictures, or fewer if fewer may be held out."""
    may_N = np.ones(len(families), bool) if recipe.hold_out == HoldOut.FAMILIES else variants(families, component_N)
    held_out_N = np.zeros(len(families), bool)
    if may_N.any():
        fraction, ones = min(1.0, recipe.val_fraction * len(families) / may_N.sum()), np.ones(may_N.sum(), np.int64)
        held_out_N[may_N] = hold_out(component_N[may_N], ones, fraction=fraction, seed=recipe.seed)
    return held_out_N


def _fit_on(pictures: Sequence[Picture], rasters: np.ndarray, chosen_N: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Fits a codebook on augmented copies of the chosen pictures. Uses at most _FIT_RENDERS copies, evenly spaced."""
    every = [(number, index) for number in np.flatnonzero(chosen_N).tolist() for index in range(recipe.renders)]
    sample = every[:: -(-len(every) // _FIT_RENDERS)]
    renders = [
        augmented(rasters[number], seed=recipe.seed, key=pictures[number].key, index=i, vary=recipe.vary)
        for number, i in sample
    ]
    return fit(to_patches(np.stack([render.pixels for render in renders])), codes=recipe.codes, seed=recipe.seed)


class PictureCoder:
    """Makes documents from pictures. A document is an augmented copy of a picture, with a caption before or after the copy.

    The copies of a picture use the picture's captions in turn. In the fraction `recipe.caption_first` of the documents, the
    caption comes first. Caption and order depend on the numbers of picture and copy, not on random draws.

    Args:
        codebook: uint8 [codes, PATCH, PATCH, 3].
        first_code: Token id of code 0.
        special: Id of each special token.
        captions: Token ids of each caption.
    """

    def __init__(
        self,
        *,
        codebook: np.ndarray,
        first_code: int,
        special: Mapping[str, int],
        captions: Mapping[str, np.ndarray],
        recipe: Recipe,
    ) -> None:
        self._codebook, self._first_code, self._special = codebook, first_code, special
        self._captions, self._recipe = captions, recipe
        self._squared_error, self._values = 0.0, 0

    def documents(
        self, pictures: Sequence[Picture], rasters: np.ndarray, *, renders: int, stage: str, report: Report
    ) -> Iterator[Document]:
        """Yields `renders` documents of each picture, picture by picture."""
        for start in range(0, len(pictures), _CHUNK):
            chunk = pictures[start : start + _CHUNK]
            made = [
                augmented(raster, seed=self._recipe.seed, key=picture.key, index=index, vary=self._recipe.vary)
                for picture, raster in zip(chunk, rasters[start : start + _CHUNK], strict=True)
                for index in range(renders)
            ]
            grids = self._code(np.stack([render.pixels for render in made]))
            for place, (render, grid) in enumerate(zip(made, grids, strict=True)):
                number, index = divmod(place, renders)
                yield self._document(chunk[number], start + number, index, render, grid)
            report(stage, start + len(chunk), len(pictures))

    def image(self, raster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encodes a picture without augmentation. Returns its token ids, from the begin token to the end token, and for
        each token whether it is filler (a transparent patch)."""
        render = plain(raster)
        return self._image(render, self._code(render.pixels[None])[0])

    @property
    def psnr(self) -> float:
        """Returns the peak signal-to-noise ratio of all pictures encoded so far, in dB."""
        return float(10 * np.log10(255**2 * self._values / max(self._squared_error, 1e-9)))

    def _code(self, pixels: np.ndarray) -> np.ndarray:
        grids = encode(to_patches(pixels), self._codebook).reshape(-1, GRID * GRID)
        self._squared_error += float(((decode(grids, self._codebook).astype(np.float64) - pixels) ** 2).sum())
        self._values += pixels.size
        return grids

    def _image(self, render: Render, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = grid.astype(np.int64) + self._first_code
        image = np.concatenate([[self._special[BOI]], codes, [self._special[EOI]]])
        return image, np.concatenate([[False], render.empty.reshape(-1), [False]])

    def _document(self, picture: Picture, number: int, index: int, render: Render, grid: np.ndarray) -> Document:
        special = self._special
        image, image_filler = self._image(render, grid)
        parts, fillers = [image], [image_filler]
        if picture.captions:
            turn, which = divmod(index, len(picture.captions))
            caption = self._captions[picture.captions[which]]
            share, time = self._recipe.caption_first, turn + number
            at = 0 if int(share * (time + 1)) > int(share * time) else 1  # 0 puts the caption first, 1 puts it last
            parts.insert(at, caption)
            fillers.insert(at, np.zeros(len(caption), bool))
        return Document(
            np.concatenate([[special[BOS]], *parts, [special[EOS]]]), np.concatenate([[False], *fillers, [False]])
        )
