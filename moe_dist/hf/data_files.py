"""Reads facts about a model from the data set of its run: each token id's modality, the end mark, and the tokenizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.config.regular_file import read_regular
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import Manifest, load_manifest
from moe_dist.formats.split_files import data_digest, digest_problems
from moe_dist.formats.tokenizer_file import MAX_BYTES, read_tokenizer

TOKENIZER_FILE, README = "tokenizer.json", "README.md"


@dataclass(frozen=True)
class DataFiles:
    """The data set on which a checkpoint was trained."""

    folder: Path
    manifest: Manifest

    @property
    def marks(self) -> dict[str, int]:
        """Returns the fields of config.json with the ids of the end mark and of padding."""
        return {"eos_token_id": self.manifest.eos_id, "pad_token_id": self.manifest.pad_id}

    def tokenizer_files(self) -> dict[str, bytes]:
        """Returns the contents of the tokenizer's files for transformers; none if the data set has no tokenizer."""
        if self.manifest.tokenizer is None:
            return {}
        content = read_regular(self.folder / self.manifest.tokenizer, most_bytes=MAX_BYTES)
        added = read_tokenizer(self.folder / self.manifest.tokenizer).get_added_tokens_decoder()
        tokens = {number: token.content for number, token in added.items()}
        named = {name.removesuffix("_id"): tokens[token] for name, token in self.marks.items() if token in tokens}
        options = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
        return {
            TOKENIZER_FILE: content,
            "tokenizer_config.json": (json.dumps({**options, **named}, indent=2) + "\n").encode(),
        }


def find_data(values: Mapping[str, Any], trained_on: str, asked: Path | None) -> DataFiles:
    """Finds the data set of a checkpoint.

    Args:
        values: Values of the checkpoint's state.json.
        trained_on: `data.path` of the run's configuration.
        asked: Folder where the data set is now; None means the folder `trained_on`.

    Raises:
        ConfigError: the folder has no manifest, or the checkpoint belongs to no run.
        DataError: the run was trained on other data.
    """
    saved, folder = values.get("data"), asked or Path(trained_on)
    if not isinstance(saved, dict) and asked is None:
        raise ConfigError(
            f"data.path={trained_on!r}: the checkpoint is of no run, so this need not be its data; give --data"
        )
    manifest = load_manifest(folder)
    if isinstance(saved, dict) and (problems := digest_problems(saved, data_digest(folder, manifest))):
        raise DataError([f"{folder}: these are not the data that the model was trained on; give --data", *problems])
    return DataFiles(folder, manifest)


def readme(family: str, *, brings_code: bool, tokenizer: bool, in_transformers: bool) -> bytes:
    """Returns the README.md of an exported folder, which explains how to run the model."""
    told, folder = [f"A language model of the type `{family}`, exported by moe_dist."], "."
    if brings_code:
        told[0] += " Its code is in this folder, needs transformers 5.4 or later, and nothing of moe_dist."
        told[0] += " `moe-dist verify-export FOLDER` compares the code with that of the installed moe_dist."
    if not in_transformers:
        folder = "served"
        told[0] += (
            " transformers has no class for it. `zeda/transformers` and `zeda/sglang` of https://github.com/TsinghuaC3I/ZEDA"
            " have one; moe_dist's tests do not run it. Two commands of moe_dist, run in this folder, write the same model "
            f"with code, for transformers 5.4 or later, as the folder `{folder}`:"
        )
        told += ["", "```console", "$ moe-dist import-hf . --out imported"]
        told += [f"$ moe-dist export-hf imported --out {folder} --family moe_dist", "```"]
    options = ", trust_remote_code=True" if brings_code or not in_transformers else ""
    model = f'AutoModelForCausalLM.from_pretrained("{folder}"{options})'
    lines = run_lines(model, tokenizer=folder if tokenizer else None)
    return "\n".join([*told, "", "```python", *lines, "```", ""]).encode()


def run_lines(model: str, *, tokenizer: str | None) -> list[str]:
    """Returns Python lines that load and run a model, where `model` is the expression that loads it. The lines generate
    text if a `tokenizer` is given, and token ids otherwise."""
    if tokenizer is None:
        return [
            "import torch",
            "from transformers import AutoModelForCausalLM",
            f"model = {model}",
            "print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20))",
        ]
    # Without this argument, transformers would ask the user whether to run the model's code when it looks for the
    # tokenizer's class.
    trust = ", trust_remote_code=True" if "trust_remote_code" in model else ""
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'tokenizer, model = AutoTokenizer.from_pretrained("{tokenizer}"{trust}), {model}',
        'print(tokenizer.decode(model.generate(tokenizer("The", return_tensors="pt").input_ids, max_new_tokens=20)[0]))',
    ]
