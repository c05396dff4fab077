"""An import refuses folders with no model, an unsupported model, or damaged or malicious files. The error names the fault,
and no files are left behind."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers

from moe_dist.errors import ConfigError, DataError, MoeDistError
from moe_dist.hf.exporting import export_model
from moe_dist.hf.importing import import_model
from moe_dist.hf.source import open_source
from tests.support.messages import refused
from tests.support.tiny_hf import save, tiny_model

FIRST = "model-00001-of-00003.safetensors"
SECOND = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w1.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixtral model in three shards. Tests must not write to it."""
    folder = save(tiny_model("mixtral"), tmp_path_factory.mktemp("hf") / "mixtral")
    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = dict(tensors[number::3])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def theirs(original: Path, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(original, tmp_path / "theirs")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda values: values.update(changes))


def weight_map(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / INDEX, lambda values: change(values["weight_map"]))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], *, also_index: bool = True) -> Callable[[Path], None]:
    """Changes the tensors of the shard that contains EXPERT, and updates the index."""

    def apply(folder: Path) -> None:
        file = json.loads((folder / INDEX).read_text())["weight_map"][EXPERT]
        found = load_file(folder / file)
        before = set(found)
        change(found)
        save_file(found, folder / file)
        if also_index:
            for name in before - set(found):
                weight_map(lambda values, name=name: values.pop(name))(folder)
            weight_map(lambda values: values.update(dict.fromkeys(set(found) - before, file)))(folder)

    return apply


def truncated(folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 100)


def only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch planted'\ntR.")


def escaping(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        outside.write_bytes((folder / FIRST).read_bytes())
        weight_map(lambda values: values.update({key: name for key, file in values.items() if file == FIRST}))(folder)

    return apply


def link_out(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return apply


def tokenizer(size: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")).save(str(folder / "tokenizer.json"))

    return apply


def sparse(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with (folder / name).open("wb") as stream:
            stream.truncate(5 << 30)  # a sparse file, without blocks on the disk

    return apply


def header_of_lists(folder: Path) -> None:
    header = b'{"a":[' + b"[]," * (1 << 20) + b"[]]}"
    (folder / SECOND).write_bytes(len(header).to_bytes(8, "little") + header)


def header_of_long_numbers(folder: Path) -> None:
    """Writes a shape whose product of 500 numbers would take minutes."""
    shape = ",".join(["9" * 4200] * 500)
    header = f'{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,0]}}}}'.encode()
    (folder / SECOND).write_bytes(len(header).to_bytes(8, "little") + header)


def long_added_token(folder: Path) -> None:
    made = Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0"))
    made.add_tokens(["x" * 9_000_000])
    made.save(str(folder / "tokenizer.json"))


def slow_normalizer(folder: Path) -> None:
    """Writes a tokenizer whose regular expression would take minutes for the text of an added token."""
    made = Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0"))
    made.normalizer = normalizers.Replace(Regex("(a|aa|a)+c"), "")
    made.save(str(folder / "tokenizer.json"))
    token = {"id": 1, "content": ("a" * 16 + "b") * 5000, "normalized": True, "special": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    edit(folder / "tokenizer.json", lambda values: values.update(added_tokens=[token]))


def growing_normalizer(folder: Path) -> None:
    """Writes a tokenizer that turns its added token, a letter, into 2 ** 26 letters."""
    made = Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0"))
    made.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * 26)
    made.save(str(folder / "tokenizer.json"))
    token = {"id": 1, "content": "a", "normalized": True, "special": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    edit(folder / "tokenizer.json", lambda values: values.update(added_tokens=[token]))


def header_of_floats(folder: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[' + b"0.5," * 10_000 + b'0.5],"data_offsets":[0,0]}}'
    (folder / SECOND).write_bytes(len(header).to_bytes(8, "little") + header)


def many_files(folder: Path) -> None:
    names = {f"w{number}": f"{number}.safetensors" for number in range(10_001)}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def two_sets_of_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / FIRST).read_bytes())


def panicking(folder: Path) -> None:
    """Writes a tokenizer for which the Rust code of the library tokenizers panics."""
    tokenizer(10)(folder)
    normaliser = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    edit(folder / "tokenizer.json", lambda values: values.update(normalizer=normaliser))


def slow_pattern(folder: Path) -> None:
    """Writes a tokenizer with a regular expression whose compilation takes minutes."""
    tokenizer(10)(folder)
    pattern = {"Regex": "(?i)" + "|".join(f"straße{number}" for number in range(600_000))}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    edit(folder / "tokenizer.json", lambda values: values.update(pre_tokenizer=split))


# test_fields.py tests changed values in config.json.
BAD: dict[str, tuple[Callable[[Path], Any], type[MoeDistError], str]] = {
    "unknown family": (
        config(model_type="gpt2"),
        ConfigError,
        r"'gpt2'.*known are mixtral, olmoe, qwen3_moe, qwen2_moe, llama",
    ),
    "no family": (config(model_type=None), ConfigError, r"model_type=None: it must name a family"),
    "code of its own": (config(auto_map={"AutoModel": "x.Y"}), ConfigError, "auto_map=.*never run"),
    "quantised": (config(quantization_config={"bits": 4}), ConfigError, "quantization_config=.*originals"),
    "another head": (config(architectures=["MixtralForTokenClassification"]), ConfigError, "architectures="),
    "width left out": (
        lambda folder: edit(folder / "config.json", lambda values: values.pop("hidden_size")),
        ConfigError,
        "hidden_size is missing; a mixtral model must say it",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), DataError, "config.json: is missing"),
    "damaged config": (lambda folder: (folder / "config.json").write_text("{"), DataError, "is no JSON"),
    "deep config": (lambda folder: (folder / "config.json").write_text("[" * 10**6), DataError, "is no JSON"),
    "missing shard": (
        lambda folder: (folder / SECOND).unlink(),
        DataError,
        f"{SECOND}: is missing; copy or download it again",
    ),
    "truncated shard": (truncated, DataError, f"{SECOND}: truncated: .*; copy or download it again"),
    "not safetensors": (lambda folder: (folder / FIRST).write_bytes(b"PK\3\4" * 99), DataError, "no safetensors file"),
    "missing index": (lambda folder: (folder / INDEX).unlink(), DataError, f"{INDEX} is missing"),
    "only pickles": (only_pickles, DataError, "pytorch_model.bin: pickled weights can run code and are never read"),
    "name with ..": (escaping("../outside.safetensors"), DataError, r"plain names.*\.\./outside"),
    "absolute name": (escaping("/etc/outside.safetensors"), DataError, "plain names.*/etc/outside"),
    "hidden folder": (escaping("a/../outside.safetensors"), DataError, "plain names"),
    "a number for a name": (weight_map(lambda values: values.update({EXPERT: 3})), DataError, "plain names"),
    "link out of the folder": (link_out(FIRST), DataError, "leads out of the folder"),
    "config behind a link": (link_out("config.json"), DataError, "leads out of the folder"),
    "leftover tensor": (tensors(lambda t: t.update(extra=torch.ones(2))), DataError, "extra: is left over"),
    "missing tensor": (
        tensors(lambda t: t.pop(EXPERT)),
        DataError,
        f"{EXPERT}: is missing; take config.json and weights of one",
    ),
    "tensor beside the index": (
        tensors(lambda t: t.update(extra=torch.ones(2)), also_index=False),
        DataError,
        f"holds extra, of which {INDEX} says nothing",
    ),
    "tensor only in the index": (
        tensors(lambda t: t.pop(EXPERT), also_index=False),
        DataError,
        f"{EXPERT} is missing, which",
    ),
    "not a number": (
        tensors(lambda t: t[EXPERT].view(-1)[5:7].fill_(torch.nan)),
        DataError,
        f"{EXPERT}: 2 values of .* are NaN or infinite",
    ),
    "infinite": (tensors(lambda t: t[EXPERT].view(-1)[5].fill_(-torch.inf)), DataError, f"{EXPERT}: 1 values of"),
    "wrong shape": (tensors(lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()})), DataError, f"{EXPERT}: shape"),
    "integers": (
        tensors(lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)})),
        DataError,
        f"{EXPERT} is of dtype I8; .*save the model in one",
    ),
    "float8": (tensors(lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)})), DataError, "F8_E4M3"),
    "another tokenizer": (tokenizer(65), DataError, "gives 'w64' the id 64, but the model's vocab_size=64"),
    "sparse tokenizer": (sparse("tokenizer.json"), DataError, "tokenizer.json: 5,368,709,120 bytes, too large"),
    "sparse template": (sparse("chat_template.jinja"), DataError, "chat_template.jinja: 5,368,709,120 bytes, too large"),
    "sparse index": (sparse(INDEX), DataError, f"{INDEX}: .* is larger than"),
    "index of lists": (
        lambda folder: (folder / INDEX).write_bytes(b'{"weight_map":[' + b"[]," * (1 << 22) + b"[]]}"),
        DataError,
        f"{INDEX}: .* lists and mappings",
    ),
    "header of lists": (header_of_lists, DataError, f"{SECOND}: .* lists and mappings"),
    "header of long numbers": (header_of_long_numbers, DataError, f"{SECOND}: no safetensors file"),
    "two sets of weights": (two_sets_of_weights, DataError, f"both model.safetensors and {INDEX}.*; remove the one"),
    "nested index": (lambda folder: (folder / INDEX).write_bytes(b"[" * 100_000), DataError, f"{INDEX}: .* nested"),
    "layers without end": (config(num_hidden_layers=10**8), ConfigError, "num_hidden_layers=100000000 must be"),
    "experts without end": (config(num_local_experts=10**9), ConfigError, "num_experts=1000000000"),
    "long added token": (long_added_token, DataError, "its added_tokens have 9,000,000 characters"),
    "slow normalizer": (slow_normalizer, DataError, "tokenizer.json.*cannot load it: took more than 10 s of CPU"),
    "growing normalizer": (growing_normalizer, DataError, "tokenizer.json.*the library tokenizers cannot load it"),
    "slow pattern": (slow_pattern, DataError, "tokenizer.json.*cannot load it"),
    "header of floats": (header_of_floats, DataError, f"{SECOND}: .* 1 validation error for"),
    "many files": (many_files, DataError, f"{INDEX}: names 10,001 files"),
    "tokenizer that panics": (panicking, DataError, "tokenizer.json"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.slow
def test_is_refused(theirs: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, error, message = BAD[case]
    spoil(theirs)
    with pytest.raises(error, match=message):
        import_model(theirs, theirs.parent / "ours")
    assert not list(theirs.parent.glob("ours*"))
    assert not list(theirs.parent.rglob("planted"))


def test_all_faults_of_a_folder_are_told_at_once(theirs: Path) -> None:
    truncated(theirs)
    (theirs / FIRST).unlink()
    with pytest.raises(DataError) as told:
        import_model(theirs, theirs.parent / "ours")
    assert len(told.value.problems) == 2


def test_what_is_fine_is_taken(theirs: Path) -> None:
    """An import accepts pickles beside safetensors (it does not open them), a tokenizer smaller than the vocabulary, and
    links within the folder. Import and export copy the tokenizer's files, including SentencePiece's."""
    (theirs / "training_args.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch planted'\ntR.")
    tokenizer(60)(theirs)
    (theirs / "tokenizer.model").write_bytes(b"pieces")
    (theirs / SECOND).rename(theirs / "blob.safetensors")
    (theirs / SECOND).symlink_to("blob.safetensors")
    config(something_new=3)(theirs)
    done = import_model(theirs, theirs.parent / "ours")
    assert (list(done.ignored), list(done.unread)) == (["training_args.bin"], ["something_new"])
    export_model(theirs.parent / "ours", theirs.parent / "back")
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (theirs.parent / "back" / name).read_bytes() == (theirs / name).read_bytes()
    assert not (theirs.parent / "ours/huggingface/training_args.bin").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_may_be_stored_twice_if_it_is_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save(tiny_model("llama biased", dtype=torch.bfloat16), tmp_path / "theirs")
    found = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in found
    head = found["model.embed_tokens.weight"].to(dtype)
    save_file({**found, "lm_head.weight": head.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    import_model(folder, tmp_path / "ours", shard_bytes=1000)
    for name, other in {"number": head + torch.eye(*head.shape, dtype=dtype), "shape": head[:, 1:].contiguous()}.items():
        save_file({**found, "lm_head.weight": other}, folder / "model.safetensors", metadata={"format": "pt"})
        with refused(DataError, "lm_head.weight", "tie_word_embeddings"):
            import_model(folder, tmp_path / name)
        assert not list(tmp_path.glob(f"{name}*"))


def test_a_snapshot_of_the_hubs_cache_is_taken_and_other_links_out_of_it_are_not(theirs: Path) -> None:
    model = theirs.parent / "models--a--b"
    snapshot, blobs = model / "snapshots" / "0123abc", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(theirs.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    import_model(snapshot, theirs.parent / "ours")
    for outside in (theirs.parent / "blobs", model / "refs"):
        outside.mkdir()
        (outside / "x").write_text("{}")
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(outside / "x")
        with pytest.raises(DataError, match="leads out of the folder"):
            open_source(snapshot)


def test_a_header_that_announces_exabytes_takes_no_memory(theirs: Path) -> None:
    (theirs / FIRST).write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with refused(DataError):
        open_source(theirs)
