"""Calls the image processor of a model of transformers."""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import sched_getaffinity
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from moe_dist.config.json_text import read_json
from moe_dist.data.batch import Batch, BatchMaker, Segment
from moe_dist.data.picture_batch import PictureBatch
from moe_dist.data.picture_files import PictureRef, PictureSource, checked_part, digest, read_part
from moe_dist.data.pictures import MOST_PIXELS, decoded
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.hub_folder import offline
from moe_dist.formats.split_files import PREPROCESSOR
from moe_dist.formats.tokenizer_file import MAX_BYTES

GUIDE = "docs/how-to/pictures.md"
FORMATS = ("PNG", "JPEG", "WEBP")
# Ids of placeholders, and of the marks around them, in a family's configuration.
_IDS = re.compile(r"(image|video|vision)_(start_|end_)?token_(id|index)")
MOST_PATCHES = 1 << 16  # largest number of tokens of a picture
LLAVA = 576  # tokens of a picture for LLaVA, if config.json does not say


class PictureEncoder:
    """The image processor in a folder. Runs no code of the folder, and downloads nothing.

    Args:
        each: Tokens of every picture, for processors that make pictures of one size. 0: `pixel_values` has patches, and
            `image_grid_thw` their number. None: as the processor says, for `pixels` alone.

    Raises:
        ConfigError: the processor does not make such values, or cannot be read.
    """

    def __init__(self, folder: Path, each: int | None = None) -> None:
        try:
            self._processor = read_processor(folder)
            inputs = set(self._processor.model_input_names)
            self.merged = int(getattr(self._processor, "merge_size", 0)) ** 2  # patches of a placeholder token
        except Exception as error:  # processors check their fields in their own ways
            raise ConfigError(f"{folder}: transformers cannot read its image processor: {error}", see=GUIDE) from error
        grids = "image_grid_thw" in inputs and bool(self.merged)
        self._names = ("pixel_values", "image_grid_thw")[: 1 + grids]
        self._each, self.merged = each, 1 if each else self.merged
        if "pixel_values" not in inputs or (each is not None and grids == bool(each)):
            raise ConfigError(
                f"{folder}: its {type(self._processor).__name__} does not make pixel_values and image_grid_thw; only such "
                "models, as Qwen3-VL-MoE and ERNIE-4.5-VL-MoE, and models in LLaVA-1.5's form can be trained with pictures",
                see=GUIDE,
            )
        if each:
            self._check_one_size(folder)

    def _check_one_size(self, folder: Path) -> None:
        """Raises ConfigError if pictures of different proportions get different or gigantic sizes."""
        sides = [
            each for name in ("size", "crop_size") for each in dict(getattr(self._processor, name, None) or {}).values()
        ]
        shapes: set[tuple[int, ...]] = set()
        if max([each or 0 for each in sides], default=0) ** 2 <= MOST_PIXELS:
            for size in ((64, 32), (32, 64)):
                made = self._processor(images=[Image.new("RGB", size)], return_tensors="pt")
                shapes.add(tuple(made["pixel_values"].shape))
        if len(shapes) != 1:
            raise ConfigError(
                f"{folder}: its image processor must make pictures of one size of at most {MOST_PIXELS:,} pixels; set "
                "crop_size with do_center_crop, or height and width of size",
                see=GUIDE,
            )

    def save(self, folder: Path) -> None:
        """Writes the processor's fields as preprocessor_config.json."""
        fields = json.loads(self._processor.to_json_string())
        (folder / PREPROCESSOR).write_text(json.dumps(fields, indent=1) + "\n")

    def ref(self, source: PictureSource, name: str, row: str) -> PictureRef:
        """Reads and decodes a picture that a row names. Raises DataError if it is damaged, or the processor refuses it."""
        file, offset, length = source.find(name)
        content = read_part(source.folder, file, offset, length)
        image = decoded(content, repr(name), FORMATS)
        if self._each:
            found = (file, offset, len(content), digest(content), image.height, image.width)
            return PictureRef(*found, self._each, row)
        try:
            patches = int(self._processor.get_number_of_image_patches(image.height, image.width))
        except (ValueError, ArithmeticError) as error:
            size = f"{image.width} x {image.height}"
            raise DataError(f"picture {name!r} of {size} pixels: the image processor refuses it: {error}") from error
        if patches * self._processor.patch_size**2 > MOST_PIXELS:
            raise DataError(f"picture {name!r}: the image processor makes {patches:,} patches of it; lower its `size`")
        return PictureRef(file, offset, len(content), digest(content), image.height, image.width, patches, row)

    def pixels(self, folder: Path, ref: PictureRef) -> dict[str, torch.Tensor]:
        """Reads a picture again, and makes its `pixel_values` and `image_grid_thw`."""
        image: Image.Image = decoded(checked_part(folder, ref), repr(ref.file), FORMATS).convert("RGB")
        made = self._processor(images=[image], return_tensors="pt")
        return {name: made[name] for name in self._names}


def read_processor(folder: Path) -> Any:
    """Reads the image processor of a folder. Always takes the one that works with Pillow, so that pixels do not depend on
    the installed packages. Raises errors of many kinds if a field is wrong."""
    from transformers import AutoImageProcessor

    with offline():
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)


class PictureBatchMaker(BatchMaker):
    """Makes batches with the pictures of their segments. Threads decode the pictures.

    Args:
        folder: Folder of the data set, with a preprocessor_config.json.
        pictures: Folder of the pictures.
        lazily: Whether pictures are decoded each time a batch is used, and not kept.
    """

    def __init__(self, *, folder: Path, pictures: Path, lazily: bool, **options: Any) -> None:
        super().__init__(**options)
        self._encoder, self._pictures, self._lazily = PictureEncoder(folder), pictures, lazily
        self._threads = ThreadPoolExecutor(min(8, len(sched_getaffinity(0))), thread_name_prefix="pictures")

    def make(self, sequences: Sequence[Sequence[Segment]]) -> Batch:
        refs = [ref for segments in sequences for segment in segments for ref in segment.pictures]

        def read() -> dict[str, torch.Tensor]:
            made = list(self._threads.map(lambda ref: self._encoder.pixels(self._pictures, ref), refs))
            return {name: torch.cat([each[name] for each in made]) for name in (made[0] if made else ())}

        return PictureBatch(**vars(super().make(sequences)), more=read if self._lazily else read())


class PictureIds(NamedTuple):
    """Ids of placeholders (of videos -1: none), all ids of pictures and of the marks around them, and `PictureEncoder`'s
    `each`."""

    image: int
    video: int
    marks: list[int]
    each: int


def picture_ids(folder: Path) -> PictureIds | None:
    """Reads a folder's config.json. Returns None if the folder's model reads no pictures."""
    path = folder / "config.json"
    if not path.is_file() or not any((folder / name).is_file() for name in (PREPROCESSOR, "processor_config.json")):
        return None
    try:
        fields = read_json(path, most_bytes=MAX_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no JSON object ({error}); copy or download it again") from error
    ids = {name: each for name, each in fields.items() if _IDS.fullmatch(name) and isinstance(each, int)}
    image = ids.get("image_token_id", ids.get("image_token_index"))
    if image is None:
        return None
    each = fields.get("image_seq_length", LLAVA) if fields.get("model_type") == "llava" else 0
    if not isinstance(each, int) or (each < 1 and "image_token_index" in ids) or each > MOST_PATCHES:
        raise DataError(f"{path}: image_seq_length={each!r:.40}: must be 1 to {MOST_PATCHES}; copy or download it again")
    return PictureIds(image, ids.get("video_token_id", -1), sorted(set(ids.values())), each)
