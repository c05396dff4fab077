"""Builds a data set of conversations and texts with the tokenizer of a Hugging Face folder."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.data.baselines import count_baselines
from moe_dist.data.chat import HubTokenizer
from moe_dist.data.corpus import Recipe, Skip, content_family, refuse
from moe_dist.data.corpus_build import Figures, write_split
from moe_dist.data.corpus_files import text_files
from moe_dist.data.families import hold_out, join
from moe_dist.data.picture_coding import Document
from moe_dist.data.tables import table_rows
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest, SourceSection, write_manifest
from moe_dist.runtime.progress import Report

MESSAGES = "messages"  # name of the source of conversations
_Found = Iterable[tuple[str, Document]]  # (family, document); either all or no documents of a family are held out


def build_chat(
    folder: Path,
    name: str,
    *,
    messages: str | None,
    texts: Mapping[str, str],
    licence: str,
    tokenizer: Path,
    recipe: Recipe,
    report: Report,
    skip: Skip = refuse,
) -> tuple[Manifest, Figures]:
    """Writes a whole data set into `folder`, its manifest last.

    Args:
        messages: JSONL file, parquet file or datasets folder of conversations; None for no conversations.
        texts: Maps the name of a source to a file or folder as for `messages`, or to a folder of texts.
        tokenizer: The Hugging Face folder.

    Returns:
        The manifest, and an empty mapping: chat data have no figures to display.

    Raises:
        ConfigError, DataError: from `HubTokenizer`, `table_rows` and `text_files`; or a file has no row.
    """
    hub = HubTokenizer(tokenizer, recipe.chat_template)
    modalities = {"text": ((0, hub.size),)}
    found: dict[str, _Found] = {}
    if messages is not None:
        found[MESSAGES] = _conversations(hub, Path(messages))
    for source, path in texts.items():
        items = text_files(source, Path(path), licence, skip).items
        found[source] = ((item.family, hub.text(item.content)) for item in items)
    sources = {}
    for source, pairs in found.items():
        report(f"encode {source}", 0, 1)
        splits = {
            side: write_split(folder, f"{source}_{side}", documents, modalities=modalities, with_filler=False)
            for side, documents in _divided(pairs, recipe).items()
        }
        assert splits["train"] is not None  # `hold_out` keeps training data
        sources[source] = SourceSection(train=splits["train"], valid=splits["valid"], licence=licence)
        report(f"encode {source}", 1, 1)
    manifest = Manifest(
        name=name,
        vocab_size=hub.size,
        modalities=modalities,
        pad_id=hub.pad_id,
        eos_id=hub.eos_id,
        sources=sources,
    )
    baselines = {key: round(nats, 6) for key, nats in count_baselines(folder, manifest).items()}
    manifest = manifest.model_copy(update={"baselines": baselines})
    write_manifest(manifest, folder)
    return manifest, {}


def _divided(pairs: _Found, recipe: Recipe) -> dict[str, list[Document]]:
    families, documents = zip(*pairs, strict=True)
    sizes = np.array([len(document.tokens) for document in documents])
    held_out = hold_out(join(families), sizes, fraction=recipe.val_fraction, seed=recipe.seed)
    sides = {"train": ~held_out, "valid": held_out}
    return {side: [documents[number] for number in np.flatnonzero(chosen).tolist()] for side, chosen in sides.items()}


def _conversations(hub: HubTokenizer, path: Path) -> _Found:
    """Yields conversations. Conversations with equal tools, and equal messages up to the first user message, are one
    family."""
    where = None
    for where, row in table_rows("--messages", path, '{"messages": [...]}'):
        document = hub.conversation(row, where)
        roles = [message["role"] for message in row[MESSAGES]]
        asked = row[MESSAGES][: roles.index("user") + 1 if "user" in roles else None]
        yield content_family(_json([row.get("tools"), asked])), document
    if where is None:
        raise ConfigError(f"--messages {path}: holds no row; it needs conversations, one in a line")


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
