"""An embedding is the mean over a text's tokens, without padding. Folders that need code or pickles are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_dist.errors import ConfigError, DataError
from moe_dist.inference.router_tuning import embedder
from moe_dist.inference.router_tuning.embedder import PACKAGED, Embedder
from tests.support.messages import refused
from tests.support.special_files import SPECIAL
from tests.support.tiny_embedder import tiny_embedder

TEXTS = ["what is the number 3?", "a", "gloss number 17; word " * 9, "a word"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_embedder(tmp_path_factory.mktemp("embedder") / "tiny")


@torch.no_grad()
def by_hand(folder: Path, text: str, *, normalise: bool) -> np.ndarray:
    """Embeds one text alone, without padding."""
    from tokenizers import Tokenizer
    from transformers import BertModel

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    ids = ids if len(ids) <= 16 else [*ids[:15], ids[-1]]
    hidden = BertModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state[0]
    mean = hidden.mean(0)
    return (mean / mean.norm() if normalise else mean).numpy()


def test_texts_side_by_side_are_as_each_alone(made: Path) -> None:
    found = Embedder(made)(TEXTS)
    assert found.dtype == np.float32
    for text, row in zip(TEXTS, found, strict=True):
        np.testing.assert_allclose(row, by_hand(made, text, normalise=True), atol=1e-6)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1.0, abs=1e-6)
    assert np.linalg.norm(found[0] - found[1]) > 0.05


def test_without_normalize_lengths_are_their_own(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path / "plain", normalise=False)
    found = Embedder(folder)(TEXTS[:1])
    np.testing.assert_allclose(found[0], by_hand(folder, TEXTS[0], normalise=False), atol=1e-6)
    assert abs(np.linalg.norm(found[0]) - 1.0) > 0.01


def test_the_hash_is_of_the_contents(made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made, tmp_path / "elsewhere")
    assert Embedder(copy).sha256 == Embedder(made).sha256
    assert Embedder(tiny_embedder(tmp_path / "other", seed=1)).sha256 != Embedder(made).sha256
    (copy / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    assert Embedder(copy).sha256 != Embedder(made).sha256


def modules(folder: Path, change: Callable[[list[dict[str, object]]], None]) -> None:
    path = folder / "modules.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def pooling(folder: Path) -> None:
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')


def field(folder: Path, **fields: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **fields}))


def fifo(path: Path) -> None:
    path.unlink()
    SPECIAL["fifo"](path)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "custom module": (
        lambda f: modules(f, lambda m: m[0].update(type="my_package.Own")),
        "the module my_package.Own is code of its own, which is not run",
    ),
    "no pooling": (lambda f: modules(f, lambda m: m.pop(1)), "an embedder is Transformer, Pooling and, if"),
    "a path that leads out": (lambda f: modules(f, lambda m: m[0].update(path="../..")), "leads out of the folder"),
    "pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin: pickled weights can run code and are never read",
    ),
    "auto_map": (
        lambda f: field(f, auto_map={"AutoModel": "modeling.Own"}),
        "transformers would run the classes that it names; take another embedder",
    ),
    "kernels": (lambda f: field(f, _attn_implementation="someone/kernel"), "_attn_implementation='someone/kernel'"),
    "other weights": (
        lambda f: field(f, transformers_weights="other.safetensors"),
        "transformers_weights: is not supported",
    ),
    "quantization": (lambda f: field(f, quantization_config={"quant_method": "\x1b[31m"}), "quantization_config: is not"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter would change the model"),
    "config.json a FIFO": (lambda f: fifo(f / "config.json"), "is no regular file"),
    "pooling a FIFO": (lambda f: fifo(f / "1_Pooling/config.json"), "is no regular file"),
    "endless texts": (
        lambda f: (f / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 10**30})),
        "a number of tokens from 1 to 1,048,576",
    ),
    "other pooling": (pooling, "pooling must be pooling_mode_mean_tokens alone"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "modules.json no JSON": (lambda f: (f / "modules.json").write_text("{"), "modules.json: no JSON"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_needs_code_or_lacks_files_is_refused(made: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(made, tmp_path / "broken")
    change, message = BREAKS[name]
    change(folder)
    with pytest.raises(DataError) as raised:
        Embedder(folder)
    assert message in str(raised.value)
    assert "see docs/router-tuning.md" in str(raised.value)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels", "vocab_size"])
@pytest.mark.slow
def test_a_model_without_an_end_is_refused(made: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(made, tmp_path / "endless")
    field(folder, **{key: 10**9})
    monkeypatch.setattr(embedder, "MOST_SECONDS", 5)
    with pytest.raises(DataError, match="its model cannot be loaded"):
        Embedder(folder)(TEXTS)


def test_a_missing_folder_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(ConfigError):
        Embedder(PACKAGED)
    with refused(ConfigError):
        Embedder(tmp_path / "nowhere")
