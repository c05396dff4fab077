"""If a FIFO or a device stands in place of a data file, the error names it, and no read blocks or runs forever."""

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.data.chat import HubTokenizer
from moe_dist.data.codebook import load_codebook
from moe_dist.data.pictures import rasterise
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import load_manifest
from moe_dist.formats.numpy_file import load_array
from moe_dist.inference.questions.files import read_facts
from moe_dist.monitor.trace.foreign import read_foreign
from moe_dist.plan.preflight import check
from moe_dist.train.build.training import build_loader
from tests.support.chat_folders import chat_folder
from tests.support.cover import full
from tests.support.special_files import SPECIAL, reads_little
from tests.support.tiny import tiny_config

READERS: dict[str, Callable[[Path], object]] = {
    "q.jsonl": lambda path: read_facts([path]),
    "codebook.npy": load_codebook,
    "routed.npy": lambda path: read_foreign(path, 8),
    "a.png": rasterise,
}
FILES = ["manifest.json", "captions_train.bin", "prose_valid.idx", "captions_train.filler"]


def test_a_manifest_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as stream:
        stream.truncate(5 << 30)  # a sparse file, without blocks on the disk
    with reads_little(), pytest.raises(DataError, match="is larger than"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("name", FILES)
def test_a_special_file_is_refused_by_name_within_a_second(tiny_data: Path, tmp_path: Path, name: str, kind: str) -> None:
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / name).unlink()
    SPECIAL[kind](data / name)
    config = tiny_config(data, tmp_path / "runs")
    with reads_little(), pytest.raises((ConfigError, DataError), match=name):
        build_loader(config, check(config).manifest, rank=0, world_size=1).batches(0)


@pytest.mark.parametrize("kind", ["fifo", "device", "sparse"])
@pytest.mark.parametrize("name", READERS)
def test_readers_of_one_file_refuse_it_by_name(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "sparse":
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(40 << 30)
    else:
        SPECIAL[kind](tmp_path / name)
    with reads_little(), pytest.raises((ConfigError, DataError), match=name):
        READERS[name](tmp_path / name)


@pytest.mark.slow
def test_a_tokenizer_whose_configuration_takes_all_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_labels": 10**9}))
    with pytest.raises(DataError, match=r"transformers cannot read it: "):
        HubTokenizer(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "bpe.codes"])  # transformers reads bpe.codes for some tokenizers only
def test_a_tokenizers_pipe_is_refused(tmp_path: Path, name: str) -> None:
    SPECIAL["fifo"](tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: is no regular file"):
        HubTokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_with_a_long_added_token_is_refused(tmp_path: Path, name: str) -> None:
    token = {"id": 0, "content": "x" * 9_000_000}
    added = {"added_tokens": [token]} if name == "tokenizer.json" else {"added_tokens_decoder": {"0": token}}
    (tmp_path / name).write_text(json.dumps(added))
    with pytest.raises(DataError, match=r"added_tokens have 9,000,000|tokenizer_config\.json: 9,000,[0-9]{3} bytes"):
        HubTokenizer(tmp_path)


def test_a_sparse_chat_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    with (tmp_path / "additional_chat_templates/tools.jinja").open("wb") as stream:
        stream.truncate(5 << 30)
    with reads_little(), pytest.raises(DataError, match=r"tools\.jinja: 5,368,709,120 bytes, too large"):
        HubTokenizer(tmp_path)


OPTIONS, SPECIALS = "tokenizer_config.json", "special_tokens_map.json"
BOMB = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        # with these fields transformers would read other, unchecked files
        (OPTIONS, {"fast_tokenizer_files": ["other.json"]}, "fast_tokenizer_files=['other.json']: "),
        (OPTIONS, {"vocab_file": "/etc/passwd"}, "vocab_file='/etc/passwd': "),
        (SPECIALS, {"tokenizer_file": "other.txt"}, "tokenizer_file='other.txt': "),
        (SPECIALS, {"gguf_file": "x.gguf", "name_or_path": "evil/repo", "cache_dir": "out"}, "gguf_file='x.gguf': "),
        ("config.json", {"model_type": "rt_detr", "backbone": "evil/repo"}, "backbone='evil/repo': "),
        full(OPTIONS, {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 10**9}, "transformers cannot read it: "),
        (OPTIONS, {"added_tokens_decoder": {"900": {"content": "a", "normalized": True}}}, "transformers cannot read it: "),
        (OPTIONS, {"tokenizer_class": "RagTokenizer"}, "RagTokenizer does not tell"),
    ],
)
def test_a_folder_that_leads_elsewhere_or_without_end_is_refused(
    tmp_path: Path, name: str, fields: dict[str, Any], said: str
) -> None:
    folder = chat_folder(tmp_path / "hub", "chatml")
    bombed = {"normalizer": {"type": "Sequence", "normalizers": [BOMB] * 9}} if "added_tokens_decoder" in fields else {}
    for file, more in (("tokenizer.json", bombed), (name, fields)):
        path = folder / file
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **more}))
    with pytest.raises((ConfigError, DataError), match=re.escape(said)):
        HubTokenizer(folder)


def test_an_honest_folder_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers ignores such fields, which published folders have. An inner model may name a model of the hub."""
    from huggingface_hub import constants

    folder, asked = chat_folder(tmp_path / "hub", "chatml"), []
    notes = {"name_or_path": "a/b", "special_tokens_map_file": "/a/b.json", "tokenizer_file": None, "init_inputs": []}
    (folder / OPTIONS).write_text(json.dumps({**json.loads((folder / OPTIONS).read_text()), **notes}))
    inner = {"encoder": {"model_type": "rt_detr", "backbone": "evil/repo"}, "decoder": {"model_type": "bert"}}
    (folder / "config.json").write_text(json.dumps({"model_type": "encoder-decoder", **inner}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or (_ for _ in ()).throw(OSError))
    HubTokenizer(folder)
    assert asked == []


def header(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), header("(10**23 - 1,)"), header("(99999999999999999999999,)"),
     header("(True,)"), header("(" + "-" * 4000 + "1,)")],
    ids=["empty", "zip", "empty zip", "expression", "huge", "boolean", "nested"],
)  # fmt: skip
@pytest.mark.parametrize("mapped", [False, True])
def test_a_damaged_array_is_refused(tmp_path: Path, content: bytes, mapped: bool) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        load_array(tmp_path / "a.npy", most_bytes=None if mapped else 1 << 20)
