"""Encodes pictures as discrete tokens, and decodes them, by the VQ model of transformers in a user's folder.

The folder is that of Chameleon, Janus or Emu3, or has the VQ model alone. A picture is laid on white, prepared by the
folder's image processor, and encoded alone and in float32. Its codes therefore depend on no other picture.

Shape letters: N pictures, C codes of a picture, H height, W width.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from moe_dist.config.json_text import read_json
from moe_dist.data.picture_encoder import read_processor
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.split_files import PREPROCESSOR
from moe_dist.formats.tokenizer_file import MAX_BYTES

GUIDE = "docs/how-to/image-tokens.md"
MODELS = {"chameleon": "ChameleonVQVAE", "janus": "JanusVQVAE", "emu3": "Emu3VQVAE"}
_OF_VQ = re.compile(r"(?:.+\.)?vqmodel\.(.+)")  # name of a VQ model's tensor in the file of a whole model


class ImageTokenizer:
    """A VQ model and its image processor. Runs no code of the folder, and downloads nothing.

    Attributes:
        codes: Number of different codes.
        grid: Rows and columns of codes of a picture, which are equal for all pictures.
        digest: SHA-256 of all that decides on a picture's codes.

    Raises:
        ConfigError: the folder has no VQ model, or no image processor that fits it.
        DataError: the weights are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        fields = _object(folder / "config.json")
        kind = str(fields.get("model_type"))
        self._family = kind.removesuffix("_vqgan")
        settings = fields if kind != self._family else fields.get("vq_config")
        if self._family not in MODELS or not isinstance(settings, dict):
            raise ConfigError(
                f"{folder}/config.json: model_type={kind!r:.80} has no VQ model; give a folder of {', '.join(MODELS)}, or "
                "one that train-image-tokenizer made",
                see=GUIDE,
            )
        tensors = _tensors(folder)
        self._model = _model(folder, MODELS[self._family], settings, tensors)
        self.codes = len(self._model.quantize.embedding.weight)
        self._factor = 2 ** (len(self._model.config.channel_multiplier) - 1)
        self.grid = self._read_processor()
        self.digest = _digest(settings, folder, tensors)

    def _read_processor(self) -> tuple[int, int]:
        """Reads the image processor. Returns the grid of its pictures."""
        try:
            self._processor = read_processor(self._folder)
            _, _, height, width = self.pixels(Image.new("RGB", (64, 64)))["pixel_values"].shape
        except Exception as error:  # processors check their fields in their own ways
            raise ConfigError(f"{self._folder}: its image processor cannot be used: {error}", see=GUIDE) from error
        grid = height // self._factor, width // self._factor
        asked = getattr(self._model.config, "num_patches", grid[0])  # Janus decodes no other grid
        if grid != (asked, asked) or height % self._factor or width % self._factor:
            raise ConfigError(
                f"{self._folder}: its image processor makes {height} x {width} pixels, and the VQ model takes "
                f"{asked} x {asked} codes of {self._factor} x {self._factor} pixels; correct its size",
                see=GUIDE,
            )
        return grid

    @property
    def decodes(self) -> bool:
        """Returns whether the model has a decoder; Chameleon's has none."""
        return hasattr(self._model, "decoder")

    def pixels(self, image: Image.Image) -> Mapping[str, Tensor]:
        """Returns the inputs that the image processor makes of a picture: `pixel_values`, float [1, 3, H, W], and for Emu3
        `image_sizes`. Emu3's processor keeps a picture's proportions; it gets a square from the picture's centre, of the
        smallest size that it leaves as it is."""
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        if self._family == "emu3":
            factor = self._processor.spatial_factor
            side = math.ceil(math.sqrt(self._processor.min_pixels) / factor) * factor
            image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
        return self._processor(images=[image], return_tensors="pt")

    def shown(self, image: Image.Image) -> np.ndarray:
        """Returns a picture as the model reads it, uint8 [H, W, 3]."""
        return self._bytes(self.pixels(image)["pixel_values"].float())[0]

    @torch.no_grad()
    def encode(self, image: Image.Image) -> np.ndarray:
        """Returns the codes of a picture, int64 [C], row by row."""
        made = self.pixels(image)
        sizes = {"image_sizes": made["image_sizes"]} if self._family == "emu3" else {}
        found: Any = self._model.encode(made["pixel_values"], **sizes).image_tokens
        codes_C = (found if isinstance(found, Tensor) else torch.cat(found)).flatten().numpy()
        if len(codes_C) != math.prod(self.grid):
            raise ConfigError(
                f"{self._folder}: its image processor makes pictures of different sizes; set its do_resize and, for "
                "Chameleon, do_center_crop to true",
                see=GUIDE,
            )
        return codes_C

    def check_decodes(self) -> None:
        """Raises ConfigError if the model has no decoder."""
        if not self.decodes:
            raise ConfigError(
                f"{self._folder}: {type(self._model).__name__} has no decoder, so that it draws no pictures; take a "
                "tokenizer of Janus or Emu3, or one of train-image-tokenizer",
                see=GUIDE,
            )

    @torch.no_grad()
    def decode(self, codes_NC: np.ndarray) -> np.ndarray:
        """Makes pictures, uint8 [N, H, W, 3], from codes. Raises ConfigError if the model has no decoder."""
        self.check_decodes()
        codes = torch.from_numpy(np.asarray(codes_NC, np.int64))
        values_N3HW = self._model.decode(codes.view(-1, *self.grid) if self._family == "emu3" else codes)
        return self._bytes(values_N3HW)

    def _bytes(self, values_N3HW: Tensor) -> np.ndarray:
        values_NHW3 = values_N3HW.permute(0, 2, 3, 1).double()
        if self._processor.do_normalize:
            values_NHW3 = values_NHW3 * torch.tensor(self._processor.image_std) + torch.tensor(self._processor.image_mean)
        if self._processor.do_rescale:
            values_NHW3 = values_NHW3 / self._processor.rescale_factor
        return values_NHW3.round().clamp(0, 255).to(torch.uint8).numpy()


def _object(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, most_bytes=MAX_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; give the folder of a VQ model", see=GUIDE) from error
    return found if isinstance(found, dict) else {}


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Reads the VQ model's tensors from safetensors files, by their names in the VQ model."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = {name: _OF_VQ.fullmatch(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
                whole = any(names.values())
                found |= {
                    match[1] if match else name: file.get_tensor(name)
                    for name, match in names.items()
                    if match or not whole
                }
        except Exception as error:  # safetensors raises its own class, and OSError
            raise DataError(f"{path}: cannot be read: {error}; copy or download it again", see=GUIDE) from error
    if not found:
        raise ConfigError(f"{folder}: holds no .safetensors file, and no other format of weights is read", see=GUIDE)
    return found


def _model(folder: Path, name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    import transformers

    model_class = getattr(transformers, name)
    try:
        with torch.device("meta"):  # allocates nothing, whatever the configuration says
            model = model_class(model_class.config_class(**settings))
        model.load_state_dict({key: each.float() for key, each in tensors.items()}, assign=True)
    except Exception as error:  # configurations check their fields in their own ways
        raise DataError(
            f"{folder}: its weights and config.json make no {name}: {error!s:.300}; copy or download it again", see=GUIDE
        ) from error
    return model.eval().requires_grad_(False)


def _digest(settings: Mapping[str, Any], folder: Path, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in (PREPROCESSOR, "processor_config.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
