"""Finds everything in a model's folder that could make transformers, its pipelines or PEFT run code. Reads JSON files, and
runs nothing.

An export may contain code only in the form `moe_dist`, which puts moe_dist's own code files beside the weights.
`verify_export` compares these files with the installed package.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from reprlib import Repr
from typing import Any

from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.hub_folder import OUTSIDE
from moe_dist.hf.data_files import README
from moe_dist.hf.forms import FORMS
from moe_dist.hf.served_fields import CODE, CODES
from moe_dist.hf.source import COMPANIONS, CONFIG_FILE, INDEX_FILE, read_configuration, read_weight_map

ADAPTER_CONFIG = "adapter_config.json"
# Maps keys, at any depth of a JSON file, to a text that names the code or file that a library would run or read because of
# the key.
_KEYS = {
    "auto_map": "transformers would run the classes that it names",
    "auto_mapping": "PEFT would import the library that it names",
    "custom_pipelines": "transformers' pipelines would run the classes that it names",
    "custom_generate": "transformers would generate by the code that it names",
    "attribute_map": "transformers would read other fields in place of those that are checked here",
    **OUTSIDE,
}
# Keys whose value names an implementation. If the name is not in _SHIPPED, transformers may download and run kernels.
_KERNELS = ("attn_implementation", "experts_implementation")
_SHIPPED = ("eager", "sdpa", "flex_attention", "flash_attention_2", "grouped_mm", "batched_mm")
_SHORT = Repr()  # shows a value without printing all of it
_SHORT.maxstring = _SHORT.maxother = 80
_SPECIAL_TOKENS = "special_tokens_map.json"  # transformers adds its fields to tokenizer_config.json
# Files that the folder of a model or of adapters may contain besides config.json, weights and code.
_PLAIN = (*COMPANIONS, CONFIG_FILE, INDEX_FILE, README, ADAPTER_CONFIG, "LICENSE", ".gitattributes")


def entries(values: Any) -> Iterator[tuple[str, str, Any]]:
    """Yields (surrounding key that names kernels, or "", key, value) for each key of JSON values, at any depth. Visits each
    value once. A list gives its elements, each with the list's key."""
    rest: list[tuple[str, str, Any]] = [("", "", values)]
    for kernels, key, value in rest:  # the list grows in this loop
        if isinstance(value, list):
            rest += [(kernels, key, each) for each in value]
            continue
        if key.removeprefix("_").removesuffix("_internal") in _KERNELS:
            kernels = key
        yield kernels, key, value
        if isinstance(value, dict):
            rest += [(kernels, str(name), each) for name, each in value.items()]


def code_keys(values: Any) -> Iterator[str]:
    """Yields an error text for each key, at any depth, that could make a library run code."""
    for kernels, key, value in entries(values):
        if key in _KEYS and value:
            yield f"{key}={_SHORT.repr(value)}: {_KEYS[key]}"
        if kernels and isinstance(value, str) and value not in _SHIPPED:
            yield f"{kernels}={value!r:.80}: transformers could download and run kernels, except for {', '.join(_SHIPPED)}"


def config_problems(folder: Path, names: Sequence[str]) -> list[str]:
    """Returns an error text for each key in the folder's configuration files that could make a library run code. `names`
    are the folder's files. The config.json of an export may have the `auto_map` that exports write."""
    problems = []
    for name in sorted(name for name in names if name in (CONFIG_FILE, _SPECIAL_TOKENS) or name.endswith("_config.json")):
        values = read_configuration(folder, name)
        _, maps = CODES.get(str(values.get("model_type")), ((), ()))
        if name == CONFIG_FILE and values.get("auto_map") in maps:
            del values["auto_map"]
        problems += [f"{name}: {problem}" for problem in code_keys(values)]
    return problems


def refuse_code(folder: Path) -> None:
    """Raises ConfigError, with every such key, if a configuration file of the folder could make a library run code."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if problems := config_problems(folder, [path.name for path in folder.iterdir()]):
        fix = "code of a model is never run or copied; if the model needs none, remove the key"
        raise ConfigError([f"{folder}: {problem}; {fix}" for problem in problems], see="docs/huggingface.md")


def verify_export(folder: Path) -> list[str]:
    """Returns the reasons why loading an exported folder with trust_remote_code=True could run foreign code, which is not
    from the installed moe_dist. Empty if it could not."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    names, problems = sorted(path.name for path in folder.iterdir()), []
    for name in names:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name}: an export has plain files only")
        elif any(name in files for files, _ in CODES.values()):
            size, ours = path.stat().st_size, (CODE / name).read_bytes()
            if size != len(ours) or path.read_bytes() != ours:
                problems.append(f"{name}: differs from the file of this moe_dist; {size:,} bytes, not {len(ours):,}")
        elif name not in _PLAIN and not name.endswith(".safetensors"):
            problems.append(f"{name}: no export writes such a file")
    plain = [name for name in names if (folder / name).is_file() and not (folder / name).is_symlink()]
    if ADAPTER_CONFIG in plain:
        base = read_configuration(folder, ADAPTER_CONFIG).get("base_model_name_or_path")
        problems.append(
            f"{ADAPTER_CONFIG}: transformers loads the base model {base!r:.200}, whose code may run and is not checked "
            "here; check the base's folder, and load it without trust_remote_code"
        )
    elif CONFIG_FILE not in plain:
        problems.append(f"{CONFIG_FILE}: is missing")
    elif (kind := str(read_configuration(folder, CONFIG_FILE).get("model_type"))) in CODES:
        problems += [f"{code}: is missing, and {CONFIG_FILE} names it" for code in CODES[kind][0] if code not in names]
    elif kind not in FORMS:
        problems.append(f"{CONFIG_FILE}: model_type={kind!r:.80}: no export writes this type")
    if INDEX_FILE in plain:
        try:
            read_weight_map(folder)
        except DataError as error:
            problems += error.problems
    return problems + config_problems(folder, plain)
