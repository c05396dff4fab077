"""Codes of pictures are those of transformers' own models. Tests the decoder, and folders that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from moe_dist.data.image_tokenizer import ImageTokenizer
from moe_dist.data.token_pictures import codes_of
from moe_dist.errors import ConfigError, DataError, MoeDistError
from tests.support.messages import refused
from tests.support.vq_folders import PROCESSORS, vq_folder

SIZES = [(32, 32), (64, 64), (40, 30), (30, 40), (17, 90), (90, 17), (8, 8), (33, 31), (100, 75), (5, 64)]


@pytest.fixture(scope="module", params=PROCESSORS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vq_folder(tmp_path_factory.mktemp("vq") / request.param, request.param)


@pytest.mark.slow
def test_codes_are_those_of_transformers(folder: Path) -> None:
    """500 pictures of ten sizes have the ids that the whole model gives them, mapped back to codes."""
    import transformers as hf

    tokenizer, rng = ImageTokenizer(folder), np.random.default_rng(0)
    processor: Any = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    if folder.name == "janus":
        whole: Any = hf.JanusVQVAE.from_pretrained(folder)
    else:
        whole = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    for number in range(500):
        image = Image.fromarray(rng.integers(0, 256, (*SIZES[number % 10], 3)).astype(np.uint8))
        given = ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC) if folder.name == "emu3" else image
        inputs = processor(images=[given], return_tensors="pt")
        with torch.no_grad():
            if folder.name == "janus":
                expected = whole.encode(inputs["pixel_values"]).image_tokens
            elif folder.name == "chameleon":
                ids = whole.model.get_image_tokens(inputs["pixel_values"]).flatten().tolist()
                expected = [whole.model.vocabulary_mapping.bpe2img[each] for each in ids]
            else:
                ids = whole.model.get_image_tokens(inputs["pixel_values"], inputs["image_sizes"])
                expected = whole.model.vocabulary_mapping.convert_bpe2img(ids.view(8, 9)).flatten()
        np.testing.assert_array_equal(tokenizer.encode(image), np.asarray(expected), str(number))


def test_codes_are_decoded_as_transformers_does(folder: Path) -> None:
    tokenizer, codes_NC = ImageTokenizer(folder), np.random.default_rng(0).integers(0, 64, (3, 64))
    if folder.name == "chameleon":
        with refused(ConfigError, "has no decoder"):
            tokenizer.decode(codes_NC)
        return
    codes = torch.from_numpy(codes_NC)
    with torch.no_grad():
        values = tokenizer._model.decode(codes if folder.name == "janus" else codes.view(3, 8, 8)).numpy()
    images: Any = tokenizer._processor.postprocess(list(values), return_tensors="PIL.Image.Image")["pixel_values"]
    made, shown = tokenizer.decode(codes_NC).astype(int), np.stack([np.asarray(each) for each in images])
    assert made.shape == (3, 32, 32, 3)
    assert np.abs(made - shown).max() <= 1  # transformers cuts off, and does not round


def test_transparency_is_white_and_damage_is_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = ImageTokenizer(folder)
    white = tokenizer.encode(Image.new("RGB", (32, 32), "white"))
    assert (tokenizer.encode(Image.new("RGBA", (32, 32), (200, 0, 0, 0))) == white).all()
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with refused(DataError, "cut.png", golden=False):
        codes_of(tmp_path / "cut.png", tokenizer)


def _other_grid(folder: Path) -> None:
    values = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**values, "size": {"height": 64, "width": 64}}))


@pytest.mark.parametrize(
    ("change", "error", "key"),
    [
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), ConfigError, "model_type"),
        (lambda folder: (folder / "config.json").unlink(), ConfigError, "config.json"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), ConfigError, "image processor"),
        (lambda folder: (folder / "model.safetensors").unlink(), ConfigError, ".safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\1" * 64), DataError, "model.safetensors"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "janus_vqgan"}'), DataError, "JanusVQVAE"),
        (_other_grid, ConfigError, "correct its size"),
    ],
    ids=["family", "no_config", "no_processor", "no_weights", "damaged", "other_config", "other_grid"],
)
def test_a_folder_that_does_not_fit(
    change: Callable[[Path], object], error: type[MoeDistError], key: str, tmp_path: Path
) -> None:
    vq_folder(tmp_path / "vq", "janus")
    change(tmp_path / "vq")
    with refused(error, key, golden=False):
        ImageTokenizer(tmp_path / "vq")


def test_the_digest_follows_weights_and_processor(tmp_path: Path) -> None:
    before = ImageTokenizer(vq_folder(tmp_path / "vq", "janus")).digest
    assert ImageTokenizer(vq_folder(tmp_path / "again", "janus")).digest == before
    values = json.loads((tmp_path / "vq/preprocessor_config.json").read_text())
    (tmp_path / "vq/preprocessor_config.json").write_text(json.dumps({**values, "image_mean": [0.4] * 3}))
    assert ImageTokenizer(tmp_path / "vq").digest != before
