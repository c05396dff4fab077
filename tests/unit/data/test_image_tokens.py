"""Data sets of a transformers VQ model have the codes that transformers itself computes, and pictures come back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moe_dist.data.corpus import Recipe
from moe_dist.data.image_tokenizer import ImageTokenizer
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.prepare import Inputs, prepare
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import Manifest, load_manifest
from moe_dist.inference.vocabulary import Vocabulary
from tests.support.invoked import invoke
from tests.support.messages import refused
from tools import train_image_tokenizer

SIZES = [(16, 16), (16, 40), (33, 17), (64, 64), (50, 20), (24, 24), (80, 81), (128, 32), (12, 100), (48, 47)]
CODES = 24
_VQ: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 8}
_VQ |= {"latent_channels": 8, "num_embeddings": CODES, "attn_resolutions": [], "resolution": 16, "num_patches": 8}
NAMES = {"<pad>": 1, "<s>": 0, "</s>": 2, "<racm3:break>": 30, "<eoss>": 31, "<image>": 32}
NAMES |= {f"IMGIMG{chr(65 + code // 10)}{chr(65 + code % 10)}Z": 4 + (code * 7) % CODES for code in range(CODES)}


def pictures(folder: Path, count: int) -> Path:
    """Writes `count` pictures of ten sizes, each with a caption."""
    folder.mkdir()
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        rng = np.random.default_rng(number)
        image = Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)).resize((width, height))
        image.convert(["RGB", "RGBA", "L"][number % 3]).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"picture {number}")
    return folder


def janus(folder: Path) -> Path:
    from transformers import JanusVQVAE, JanusVQVAEConfig

    torch.manual_seed(0)
    JanusVQVAE(JanusVQVAEConfig(**_VQ)).save_pretrained(folder)
    fields = {"image_processor_type": "JanusImageProcessor", "size": {"height": 16, "width": 16}, "min_size": 4}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return folder


def chameleon(folder: Path) -> Path:
    """Saves a tiny Chameleon with its tokenizer. Its codes have other ids than their order."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 64}
    vq = {key: each for key, each in _VQ.items() if key != "num_patches"}
    torch.manual_seed(0)
    config = ChameleonConfig(**sizes, num_key_value_heads=2, vq_config=vq, vocabulary_map=NAMES)
    ChameleonForConditionalGeneration(config).save_pretrained(folder)
    words = {f"w{number}": number for number in range(33, 64)} | NAMES
    tokenizer = Tokenizer(models.WordLevel({**words, "picture": 40}, unk_token="<image>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    size = {"crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 16}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ChameleonImageProcessor", **size})
    )
    return folder


def reference(folder: Path) -> Callable[[Path], list[int]]:
    """Returns a function that computes a picture's codes by transformers' own classes."""
    from transformers import AutoImageProcessor, ChameleonForConditionalGeneration, JanusVQVAE

    processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    is_chameleon = (folder / "tokenizer.json").exists()
    whole: Any = (ChameleonForConditionalGeneration if is_chameleon else JanusVQVAE).from_pretrained(folder).eval()
    model = whole.model.vqmodel if is_chameleon else whole

    @torch.no_grad()
    def codes(path: Path) -> list[int]:
        image = Image.open(path).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return model.encode(processor(images=[image], return_tensors="pt")["pixel_values"]).image_tokens.flatten().tolist()

    return codes


def prepared(out: Path, source: Path, **options: Any) -> tuple[Manifest, list[str]]:
    skipped: list[str] = []
    recipe = Recipe(**{"val_fraction": 0.2, "vocab_size": 300, **options})
    prepare(out, Inputs(images=str(source)), recipe, lambda *_: None, lambda error: skipped.append(str(error)))
    return load_manifest(out), skipped


def documents(folder: Path, manifest: Manifest) -> list[list[int]]:
    section = manifest.sources["images"]
    splits = [IndexedSplit(folder, each) for each in (section.train, section.valid) if each is not None]
    return [
        split.tokens(start, length).tolist()
        for split in splits
        for start, length in zip(split.starts_D.tolist(), split.lengths_D.tolist(), strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("make", [janus, chameleon])
def test_codes_equal_those_of_transformers(tmp_path: Path, make: Any) -> None:
    """500 pictures of ten sizes, bit for bit, before and after their captions."""
    folder, source = make(tmp_path / "tokenizer"), pictures(tmp_path / "pictures", 500)
    texts = {"tokenizer": str(folder)} if make is chameleon else {}
    manifest, skipped = prepared(tmp_path / "out", source, image_tokenizer=str(folder), **texts)
    assert not skipped
    image = manifest.image
    assert image is not None
    assert image.grid == (8, 8)
    first = manifest.modalities["image"][0][0]
    ids = {code: 4 + (code * 7) % CODES if make is chameleon else first + code for code in range(CODES)}
    own = reference(folder)
    wanted = {tuple(ids[code] for code in own(path)) for path in source.glob("*.png")}
    found: dict[tuple[int, ...], list[bool]] = {}
    for tokens in documents(tmp_path / "out", manifest):
        at = tokens.index(image.begin_id)
        assert tokens[at + 65] == image.end_id
        found.setdefault(tuple(tokens[at + 1 : at + 65]), []).append(at > 1)
    assert found.keys() == wanted
    assert sum(map(len, found.values())) == 1000
    assert all(orders.count(True) == orders.count(False) for orders in found.values())


def test_pictures_come_back(tmp_path: Path) -> None:
    """`Vocabulary` draws held-out pictures by the model's decoder, and reads files into the same codes."""
    folder, source = janus(tmp_path / "tokenizer"), pictures(tmp_path / "pictures", 20)
    manifest, _ = prepared(tmp_path / "out", source, image_tokenizer=str(folder))
    vocabulary = Vocabulary(tmp_path / "out", manifest, vocab_size=manifest.vocab_size)
    tokenizer = ImageTokenizer(folder)
    held = vocabulary.heldout()[0]
    path = source / f"{int(held.caption.split()[1]):03}.png"
    assert vocabulary.read_picture(path).tolist() == held.codes.tolist() == reference(folder)(path)
    assert np.array_equal(np.asarray(vocabulary.drawn(held.codes)), tokenizer.decode(held.codes[None])[0])
    assert vocabulary.drawn(held.codes).size == (16, 16)
    janus_again = tmp_path / "other"
    janus(janus_again)
    fields = json.loads((janus_again / "preprocessor_config.json").read_text())
    (janus_again / "preprocessor_config.json").write_text(json.dumps({**fields, "min_size": 5}))
    (tmp_path / "out" / "image_tokenizer").unlink()
    (tmp_path / "out" / "image_tokenizer").symlink_to(janus_again)
    with refused(ConfigError, "is not the image tokenizer"):
        Vocabulary(tmp_path / "out", manifest, vocab_size=manifest.vocab_size).check_draws()


def test_damage_and_wrong_options_are_named(tmp_path: Path) -> None:
    folder, source = janus(tmp_path / "tokenizer"), pictures(tmp_path / "pictures", 12)
    (source / "003.png").write_bytes((source / "003.png").read_bytes()[:60])
    manifest, skipped = prepared(tmp_path / "out", source, image_tokenizer=str(folder))
    assert len(skipped) == 1
    assert "003.png" in skipped[0]
    assert sum(1 for _ in documents(tmp_path / "out", manifest)) == 22
    with refused(ConfigError, "--codes", "--image-tokenizer"):
        prepared(tmp_path / "no", source, image_tokenizer=str(folder), codes=7)
    with refused(ConfigError, "no VQ model"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
        ImageTokenizer(tmp_path / "empty")
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:500])
    with refused(DataError, "cannot be read", golden=False):
        ImageTokenizer(folder)
    with refused(ConfigError, "no decoder"):
        ImageTokenizer(chameleon(tmp_path / "chameleon")).check_decodes()


@pytest.mark.slow
def test_a_small_tokenizer_learns(tmp_path: Path) -> None:
    """A short training keeps more of the pictures than their mean colours would, and writes a sheet and a folder."""
    source, out = pictures(tmp_path / "pictures", 40), tmp_path / "made"
    options = ["--size", "16", "--cells", "8", "--codes", "64", "--steps", "150"]
    made = invoke(train_image_tokenizer.main, source, "--out", out, *options)
    assert made.exit_code == 0, made.output
    shown = [ImageTokenizer(out).shown(Image.open(path)).astype(float) for path in source.glob("*.png")]
    grey = 10 * np.log10(255**2 / np.mean([np.square(each - each.mean((0, 1))).mean() for each in shown]))
    assert float(made.output.partition("PSNR ")[2].split()[0]) > grey + 1  # of one colour for each picture
    with Image.open(out / train_image_tokenizer.SHEET) as sheet:
        assert sheet.size == (12 * 16, 2 * 16)
    assert ImageTokenizer(out).grid == (8, 8)
    assert invoke(train_image_tokenizer.main, source, "--out", out).exit_code == 78
