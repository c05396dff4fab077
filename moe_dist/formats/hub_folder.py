"""Keeps transformers within a Hugging Face folder: names the keys that lead out of it, and blocks downloads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dist.config.json_text import read_json
from moe_dist.formats.tokenizer_file import MAX_ADDED_BYTES, MAX_BYTES

# Maps keys of JSON files to a text that says what transformers would do because of the key.
OUTSIDE = {
    **dict.fromkeys(
        ("gguf_file", "tokenizer_file", "vocab_file", "merges_file", "fast_tokenizer_files", "init_inputs"),
        "transformers would read another tokenizer than the one that is checked here",
    ),
    "cache_dir": "transformers would write into the folder that it names",
    "backbone": "transformers would download the model that it names",
}


def outside_keys(folder: Path) -> list[str]:
    """Returns an error text for each key of a tokenizer's folder that leads out of the folder. A null leads nowhere.

    Raises:
        OSError, ValueError: a file is no JSON, or too large.
    """
    problems = []
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        if (path := folder / name).exists():
            found = read_json(path, most_bytes=MAX_BYTES if name == "config.json" else MAX_ADDED_BYTES)
            fields = found if isinstance(found, dict) else {}
            problems += [f"{name} has {key}={fields[key]!r:.80}: {OUTSIDE[key]}" for key in OUTSIDE if fields.get(key)]
    return problems


@contextmanager
def offline() -> Iterator[None]:
    """Makes every request to the hub fail in the with block. An argument `local_files_only` alone does not, because fields
    of a folder can replace it. The variable HF_HUB_OFFLINE has no effect after the import of huggingface_hub."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
