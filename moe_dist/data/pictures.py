"""Makes small pictures from files: rasterises a file once, then scales, shifts and flips the raster on a background.

A raster is uint8 RGBA [RASTER, RASTER, 4].
"""

import io
import re
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from moe_dist.config.regular_file import read_regular
from moe_dist.data.codebook import GRID, PATCH, SIDE
from moe_dist.data.corpus import VARIATIONS
from moe_dist.data.corpus_files import MOST_BYTES
from moe_dist.errors import DataError

RASTER = 64
MOST_PIXELS = 50_000_000  # a file of a few kilobytes can have so many, and the raster of each takes up to 12 bytes
MOST_SCANNED = 1_000_000_000  # pixels times scans of a progressive JPEG; the slowest of three such files took 4 s
SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")  # head of a JPEG's scan; it has 1 to some 10 of them
FORMATS = ("PNG", "JPEG")  # other formats are unsafe: for EPS, whatever the file's name, Pillow starts `gs`
SCALES = (0.75, 1.1)
# The colours are light, so that black outlines stay visible on each background.
BACKGROUNDS = (
    (255, 255, 255), (216, 216, 216), (250, 226, 160), (252, 200, 190),
    (244, 190, 226), (196, 208, 250), (170, 222, 236), (190, 232, 176),
)  # fmt: skip


@dataclass(frozen=True)
class Render:
    """A picture of SIDE x SIDE pixels, which the codebook encodes."""

    pixels: np.ndarray  # uint8 RGB [SIDE, SIDE, 3]
    empty: np.ndarray  # bool [GRID, GRID], true if the patch shows only background


def rasterise(path: str | Path, *, svg: bool = False) -> np.ndarray:
    """Rasterises a picture file (PNG or JPEG). A picture that is not square gets transparent margins. Raises DataError if
    the file is damaged, has an unknown format or more than MOST_PIXELS pixels.

    Args:
        svg: Whether the file is an SVG of a trusted package. resvg limits neither time nor memory, and reads files that an
            SVG names.
    """
    path = Path(path)
    try:
        if svg:
            import resvg_py  # imported late, because only SVG files need it

            png = resvg_py.svg_to_bytes(svg_path=str(path), width=RASTER, height=RASTER, skip_system_fonts=True)
            content = bytes(png)
        else:
            content = read_regular(path, most_bytes=MOST_BYTES)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            raise DataError(f"picture {str(path)!r} cannot be read: {error.strerror}") from error
        raise DataError(f"picture {str(path)!r}: not an SVG, or damaged; replace or remove it") from error
    image = decoded(content, repr(str(path))).convert("RGBA")
    factor = RASTER / max(image.size)
    image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.Resampling.BOX)
    raster = Image.new("RGBA", (RASTER, RASTER))
    raster.paste(image, ((RASTER - image.width) // 2, (RASTER - image.height) // 2))
    return np.asarray(raster)


def decoded(content: bytes, named: str, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decodes all of a picture, and turns it upright as its EXIF says. Raises DataError as `rasterise` does."""
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
        if image.width * image.height > MOST_PIXELS:
            raise Image.DecompressionBombError
        scans = len(SCAN.findall(content)) if image.format in ("JPEG", "MPO") else 0
        if scans * image.width * image.height > MOST_SCANNED:
            raise DataError(f"picture {named} has {scans:,} scans, each over the whole picture; save it again as PNG")
        image.load()
        if image.mode == "P":
            image.convert("RGBA")  # raises if the palette is wrong
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's conversions clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return ImageOps.exif_transpose(image)
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"picture {named} has more than {MOST_PIXELS:,} pixels; scale it down") from error
    except Exception as error:  # Pillow's decoders and its reader of EXIF raise many kinds
        kinds = f"{', '.join(formats[:-1])} or {formats[-1]}"
        raise DataError(f"picture {named}: not a {kinds}, or damaged; replace or remove it") from error


def plain(raster: np.ndarray, *, mirrored: bool = False) -> Render:
    """Lays the raster on a white background, without augmentation. Pictures are compared in this form."""
    return _lay(_scaled(raster, SIDE, mirrored), (0, 0), BACKGROUNDS[0])


def augmented(raster: np.ndarray, *, seed: int, key: str, index: int, vary: Collection[str] = VARIATIONS) -> Render:
    """Makes the augmented copy `index` of picture `key`. The random draws of scale, shift, flip and background depend only
    on (seed, key, index). Properties that `vary` does not name are as in `plain`."""
    rng = np.random.default_rng((seed, zlib.crc32(key.encode()), index))
    side = round(SIDE * rng.uniform(*SCALES))
    room = SIDE - side  # number of margin pixels; negative if the picture is larger than the frame and gets cropped
    x, y = rng.integers(min(room, 0), max(room, 0), size=2, endpoint=True).tolist()
    background, mirrored = BACKGROUNDS[rng.integers(len(BACKGROUNDS))], bool(rng.integers(2))
    if "place" not in vary:
        side, x, y = SIDE, 0, 0
    if "background" not in vary:
        background = BACKGROUNDS[0]
    return _lay(_scaled(raster, side, mirrored and "flip" in vary), (x, y), background)


def _scaled(raster: np.ndarray, side: int, mirrored: bool) -> Image.Image:
    image = Image.fromarray(raster).resize((side, side), Image.Resampling.BOX)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def _lay(image: Image.Image, at: tuple[int, int], background: tuple[int, int, int]) -> Render:
    layer = Image.new("RGBA", (SIDE, SIDE))
    layer.paste(image, at)
    alpha = np.asarray(layer)[..., 3]
    empty = (alpha == 0).reshape(GRID, PATCH, GRID, PATCH).all(axis=(1, 3))
    canvas = Image.new("RGBA", (SIDE, SIDE), (*background, 255))
    return Render(np.asarray(Image.alpha_composite(canvas, layer))[..., :3], empty)
