"""Encodes conversations with pictures, as the processor of a model of transformers does.

A row has one of three forms: `messages` whose contents have parts of type image with their files; `messages` and a list
`images`, whose files the parts of type image take in order; or LLaVA's `conversations`, with <image> in the texts.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.data.chat import HubTokenizer
from moe_dist.data.chat_rows import MESSAGES_ROW, Encoded, encode_conversation
from moe_dist.data.picture_coding import Document
from moe_dist.data.picture_encoder import GUIDE, PictureEncoder
from moe_dist.data.picture_files import PictureRef, PictureSource
from moe_dist.data.shards import ShardRow
from moe_dist.data.tables import parsed_row
from moe_dist.errors import DataError

_KEYS = ("image", "path", "url", "image_url")  # of a part with a picture, and of a row of LLaVA
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")


class PictureChats:
    """Encodes the rows of a source whose conversations may have pictures.

    Args:
        root: Folder of the pictures, in which rows name files.
        token_id, video_id: Ids of the placeholder tokens of pictures and, or -1, of videos.
        most_tokens: Rows of pictures with more tokens are refused.
    """

    def __init__(self, encoder: PictureEncoder, root: Path, token_id: int, video_id: int, most_tokens: int | None) -> None:
        self._encoder, self._root, self._most_tokens = encoder, root, most_tokens
        self._token_id, self._video_id = token_id, video_id

    def __call__(self, hub: HubTokenizer, row: bytes | dict[str, Any], where: str) -> Encoded:
        """Encodes a row. Conversations that begin with equal pictures are one family."""
        try:
            return self._encoded(hub, parsed_row(row, where, MESSAGES_ROW), where)
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # values of types that no conversation has
            raise DataError(f"{where}: cannot be encoded ({error!r:.200}); correct or remove it", see=GUIDE) from error

    def _encoded(self, hub: HubTokenizer, row: dict[str, Any], where: str) -> Encoded:
        is_of_shard = isinstance(row, ShardRow)
        source = PictureSource(self._root, *((row["__shard__"], row["__members__"]) if is_of_shard else ()))
        row, names = plain_row(row, where)
        wanted = _places(row)
        if source.shard and wanted and not names:
            names = list(source.members)
        if wanted != len(names):
            raise DataError(f"{where}: places for pictures: {wanted}, but pictures: {len(names)}; name each", see=GUIDE)
        try:
            refs = [self._encoder.ref(source, name, where) for name in names]
        except DataError as error:
            raise DataError([f"{where}: {problem}" for problem in error.problems], see=GUIDE) from error
        family, documents, notes = encode_conversation(hub, row, where)
        documents = [self._expanded(each, refs, where) for each in documents]
        if len(documents[-1].pictures) != len(refs):
            raise DataError(
                f"{where}: the chat template prints {len(documents[-1].pictures)} placeholders for {len(refs)} pictures; "
                "let an assistant's message be the last, and use the model's own template",
                see=GUIDE,
            )
        return refs[0].digest if refs else family, documents, notes

    def _expanded(self, document: Document, refs: list[PictureRef], where: str) -> Document:
        """Repeats each placeholder for the picture's patches."""
        is_picture = document.tokens == self._token_id
        found = int(is_picture.sum())
        if found > len(refs):
            raise DataError(
                f"{where}: placeholders: {found}, but pictures: {len(refs)}; remove its text from messages",
                see=GUIDE,
            )
        if (document.tokens[~is_picture] == self._video_id).any():
            raise DataError(
                f"{where}: has the placeholder of a video, and videos are not read; remove its text, or the row",
                see=GUIDE,
            )
        counts = np.ones(len(is_picture), np.int64)
        counts[is_picture] = [ref.patches // self._encoder.merged for ref in refs[:found]]
        assert document.prompt is not None
        prompt = np.repeat(document.prompt | is_picture, counts)
        tokens = np.repeat(document.tokens, counts)
        if self._most_tokens is not None and refs and len(tokens) > self._most_tokens:
            raise DataError(f"{where}: {len(tokens):,} tokens, more than --most-tokens {self._most_tokens}; shorten it")
        return replace(document, tokens=tokens, filler=np.zeros(len(tokens), bool), prompt=prompt, pictures=refs[:found])


def plain_row(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Returns a row whose messages have parts {"type": "image"}, and the names of the pictures in order. Raises DataError
    if the row has another form."""
    images = row.get("images") or row.get("image") or []
    images = images if isinstance(images, list) else [images]
    if "conversations" in row:
        messages = [_from_llava(each, where) for each in _list(row["conversations"], "conversations", where)]
    else:
        messages = [each if isinstance(each, dict) else {} for each in _list(row.get("messages"), "messages", where)]
    names, found = [], []
    for message in messages:
        parts = message.get("content")
        if isinstance(parts, list):
            parts = [_part(part, names) for part in parts]
        found.append({**message, "content": parts})
    named = [_name(each, where) for each in [*names, *images]]
    return {"messages": found, **({"tools": row["tools"]} if "tools" in row else {})}, named


def _list(value: Any, key: str, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: {key} is {json.dumps(value, default=repr)[:80]}; it must be a list of messages", see=GUIDE
        )
    return value


def _from_llava(turn: Any, where: str) -> dict[str, Any]:
    turn = turn if isinstance(turn, dict) else {}
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = _ROLES.get(role) if isinstance(role, str) else None
    if role is None or not isinstance(text, str):
        shown = json.dumps(turn, default=repr)[:80]
        raise DataError(f'{where}: conversations has {shown}; write {{"from": "human", "value": "..."}}')
    if "<image>" not in text:
        return {"role": role, "content": text}
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split("<image>")):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece.strip("\n")}] if piece.strip("\n") else []
    return {"role": role, "content": parts}


def _part(part: Any, names: list[Any]) -> Any:
    """Returns a part without the name of its picture, which joins `names`."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type", next((key for key in _KEYS if key in part), None))
    if kind not in ("image", "image_url"):
        return part
    name = next((part[key] for key in _KEYS if part.get(key) is not None), None)
    if name is not None:
        names.append(name.get("url") if isinstance(name, dict) else name)
    return {"type": "image"}


def _name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not name or "\0" in name or _SCHEME.match(name):
        raise DataError(
            f"{where}: the picture {json.dumps(name, default=repr)[:80]} is no file beside the rows, and nothing is "
            "downloaded; name a PNG, JPEG or WebP file in the folder of the rows",
            see=GUIDE,
        )
    return name


def _places(row: Mapping[str, Any]) -> int:
    """Returns the number of parts that are pictures."""
    contents = [each["content"] for each in row["messages"] if isinstance(each["content"], list)]
    return sum(isinstance(part, dict) and part.get("type") == "image" for parts in contents for part in parts)
