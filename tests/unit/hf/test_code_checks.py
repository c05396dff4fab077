"""No file of a model's folder makes a library run code: an import refuses such a file by name, an export does not copy it,
and `verify_export` finds it if it was added to an export."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import ConfigError, DataError, MoeDistError
from moe_dist.hf.code_checks import code_keys, verify_export
from moe_dist.hf.exporting import export_model
from moe_dist.hf.importing import import_model
from moe_dist.hf.served_fields import CODE_FILES
from moe_dist.hf.source import INDEX_FILE
from tests.support.cover import full
from tests.support.invoked import invoke
from tests.support.tiny_hf import save, tiny_model
from tools.verify_export import main as verify

CODE = "from pathlib import Path\nPath('{}').touch()\nclass Planted: pass\n"
IMPLEMENTATION = {"attn_implementation": "somebody/kernels"}
# Each place is a file and the fields that make transformers, its pipelines or PEFT run code.
PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("config.json", {"auto_map": {"AutoModelForCausalLM": "planted.Planted"}}),
    "inner model": ("config.json", {"vision_config": {"auto_map": {"AutoConfig": "planted.Planted"}}}),
    "pipelines": ("config.json", {"custom_pipelines": {"ask": {"impl": "planted.Planted", "pt": ["AutoModel"]}}}),
    "attention": ("config.json", IMPLEMENTATION),
    "attention inside": ("config.json", {"_attn_implementation_internal": {"": "somebody/kernels"}}),
    "experts": ("config.json", {"_experts_implementation": "somebody/kernels"}),
    "kernels by a short name": ("config.json", {"experts_implementation": {"text_config": "sonicmoe"}}),
    "another name": ("config.json", {"attribute_map": {"auto_map": "x"}, "x": {"AutoModelForCausalLM": "planted.Planted"}}),
    "tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["planted.Planted", None]}}),
    "another's tokenizer": ("tokenizer_config.json", {"auto_map": ["somebody/else--planted.Planted", None]}),
    "special tokens": ("special_tokens_map.json", {"auto_map": {"AutoTokenizer": ["planted.Planted", None]}}),
    "another file": ("special_tokens_map.json", {"gguf_file": "x.gguf", "name_or_path": "somebody/else"}),
    "processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "planted.Planted"}}),
    "pictures": ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "planted.Planted"}}),
    "generation": ("generation_config.json", {"auto_map": {"GenerationConfig": "planted.Planted"}}),
    "generating": ("generation_config.json", {"custom_generate": "somebody/generate"}),
    "adapter": ("adapter_config.json", {"auto_mapping": {"parent_library": "planted", "base_model_class": "Planted"}}),
}


def plant(folder: Path, name: str, fields: dict[str, Any]) -> Path:
    """Adds fields to a file of the folder, and adds the code that they name. Returns the file that this code creates if it
    runs."""
    ran = folder.parent / "ran"
    (folder / "planted.py").write_text(CODE.format(ran))
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))
    return ran


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder that transformers wrote, the import of this folder, and an export with our model code."""
    root = tmp_path_factory.mktemp("models")
    save(tiny_model("mixtral"), root / "theirs")
    import_model(root / "theirs", root / "imported")
    export_model(root / "imported", root / "served", family="moe_dist")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def copies(models: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {name: shutil.copytree(path, tmp_path / name) for name, path in models.items()}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["theirs", "served"])
def test_an_import_refuses_code_by_name(copies: dict[str, Path], kind: str, place: str) -> None:
    name, fields = PLACES[place]
    ran = plant(copies[kind], name, fields)
    with pytest.raises(ConfigError) as refused:
        import_model(copies[kind], copies[kind].parent / "ours")
    assert f"{name}: " in str(refused.value)
    assert not ran.exists()
    assert not (copies[kind].parent / "ours").exists()


@pytest.mark.parametrize("place", PLACES)
def test_an_export_copies_no_code(copies: dict[str, Path], place: str) -> None:
    """An export refuses planted files both in the import's `huggingface` folder and in the folder of --like."""
    name, fields = PLACES[place]
    plant(copies["imported"] / "huggingface", name, fields)
    plant(copies["theirs"], name, fields)
    for like in (None, copies["theirs"]):
        with pytest.raises(ConfigError, match=name):
            export_model(copies["imported"], copies["served"].parent / "out", like=like)
    assert not (copies["served"].parent / "out").exists()


def test_the_planted_code_would_run(copies: dict[str, Path]) -> None:
    """Proves that the planted code works: transformers runs a tokenizer's code if `trust_remote_code` allows it."""
    from transformers import AutoTokenizer

    ran = plant(copies["served"], *PLACES["tokenizer"])
    with pytest.raises(Exception, match="Planted"):
        AutoTokenizer.from_pretrained(copies["served"], trust_remote_code=True)
    assert ran.exists()


def other_code(folder: Path) -> None:
    path = folder / CODE_FILES[1]
    path.write_text(path.read_text() + "\nprint('more')\n")


def adapters_alone(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/base"}))


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{place: (lambda folder, of=of: plant(folder, *of), of[0]) for place, of in PLACES.items()},
    "changed code": (other_code, "modeling_moe_dist.py: differs"),
    "a terabyte of code": (lambda folder: os.truncate(folder / CODE_FILES[1], 1 << 40), "modeling_moe_dist.py: differs"),
    "code is missing": (lambda folder: (folder / CODE_FILES[1]).unlink(), "modeling_moe_dist.py: is missing"),
    "more code": (lambda folder: (folder / "more.py").write_text(""), "more.py: no export writes"),
    "compiled code": (lambda folder: (folder / "modeling_moe_dist.so").write_bytes(b""), "modeling_moe_dist.so: no export"),
    "a way to generate": (lambda folder: (folder / "custom_generate").mkdir(), "custom_generate: an export has plain"),
    "a pickle": (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin: no export"),
    "a link": (lambda folder: (folder / "vocab.json").symlink_to("/etc/passwd"), "vocab.json: an export has plain"),
    "another model": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "loads the base model None"),
    "adapters alone": (adapters_alone, "loads the base model 'somebody/base'"),
    "another type": (lambda folder: plant(folder, "config.json", {"model_type": "theirs"}), "model_type='theirs'"),
    "a path in the index": (
        lambda folder: plant(folder, INDEX_FILE, {"weight_map": {"a": "../a.safetensors"}}),
        "plain names of .safetensors",
    ),
    "no model": (lambda folder: (folder / "config.json").unlink(), "config.json: is missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_put_into_an_export_is_found(copies: dict[str, Path], change: str) -> None:
    folder = copies["served"]
    assert verify_export(folder) == []
    apply, message = CHANGES[change]
    apply(folder)
    assert any(message in problem for problem in verify_export(folder))


def test_the_command(copies: dict[str, Path]) -> None:
    done = invoke(verify, copies["served"])
    assert (done.exit_code, "brings no code but that of this moe_dist" in done.stdout.replace("\n", " ")) == (0, True)
    other_code(copies["served"])
    done = invoke(verify, copies["served"])
    assert (done.exit_code, "modeling_moe_dist.py: differs" in done.stderr) == (65, True)
    assert "moe-dist verify-export" in (copies["served"] / "README.md").read_text()


@pytest.mark.parametrize("name", ["config.json", full("tokenizer_config.json")])
def test_millions_of_fields_are_refused_at_once(copies: dict[str, Path], name: str) -> None:
    fields = ", ".join(f'"k{number}": 1' for number in range(3_000_000))
    (copies["theirs"] / name).write_text(f"{{{fields}}}")
    begun = time.process_time()
    with pytest.raises(DataError, match=f"{name}: .* is larger than"):
        import_model(copies["theirs"], copies["theirs"].parent / "ours")
    assert time.process_time() - begun < 1.0


def test_many_fields_in_a_small_file_are_refused(copies: dict[str, Path]) -> None:
    path = copies["theirs"] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **{f"k{number}": 1 for number in range(20_000)}}))
    with pytest.raises(MoeDistError, match="fields, and a model's configuration has a few hundred"):
        import_model(copies["theirs"], copies["theirs"].parent / "ours")


class Counted(dict[str, Any]):
    """Counts how often its items are listed."""

    listed = 0

    def items(self) -> Any:
        Counted.listed += 1
        return super().items()


@pytest.mark.parametrize("key", ["attn_implementation", "auto_map"])
def test_nested_keys_are_visited_once(key: str) -> None:
    values = Counted(a=1)
    for _ in range(50):
        values = Counted({key: values})
    Counted.listed = 0
    assert len(list(code_keys(values))) == (50 if key == "auto_map" else 0)
    assert Counted.listed == 51
