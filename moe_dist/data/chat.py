"""Encodes conversations and texts as documents, with the tokenizer of a Hugging Face folder.

A conversation has the same token ids and labels as `apply_chat_template(..., return_dict=True,
return_assistant_tokens_mask=True)` of transformers returns. Chat templates run in jinja's sandbox, as in transformers. The
sandbox limits neither time nor memory, but `chat_rows` limits both. The template's {% generation %} blocks mark the labels.
For a template without generation blocks, `chat_masks` finds the labels.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import SecurityError, TemplateSyntaxError

from moe_dist.config.json_text import read_json
from moe_dist.config.regular_file import read_regular
from moe_dist.data.chat_losses import check_losses
from moe_dist.data.chat_masks import Messages, Span, TurnFinder
from moe_dist.data.chat_turns import Rendered, Turns, UntoldTurnError, marked_turns, rendered_turns
from moe_dist.data.picture_coding import Document
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.hub_folder import offline, outside_keys
from moe_dist.formats.tokenizer_file import (
    MAX_ADDED_BYTES,
    MAX_BYTES,
    MAX_TEMPLATE_BYTES,
    checked_tokenizer,
    limited,
    tokenizer_errors,
)

GUIDE = "docs/data.md"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # transformers finds {% generation %} by this pattern
_WAY_OUT = "put {% generation %} and {% endgeneration %} around what an assistant writes, and pass it with --chat-template"


@dataclass(frozen=True)
class Conversation:
    """An encoded conversation.

    Attributes:
        documents: One document, or one document per turn to train on.
        notes: Warnings for the user. A warning has the same text in all conversations.
    """

    documents: tuple[Document, ...]
    notes: tuple[str, ...]


class HubTokenizer:
    """The tokenizer of a Hugging Face folder. Runs no code of the folder, and downloads nothing.

    Args:
        folder: Folder with the tokenizer's files. If it also has a config.json, the tokenizer must fit the model in it.
        template: File with the chat template to use; None for the tokenizer's own template.
        turns: The turns to train on if the template rewrites a conversation's earlier turns.

    Attributes:
        size: The largest token id plus 1.
        pad_id, eos_id: Token ids of padding and of the end of a text.

    Raises:
        ConfigError: transformers is missing, the tokenizer has no end token or gives no offsets, or `template` is not a
            file.
        DataError: the tokenizer cannot be read, or does not fit the model in the folder.
    """

    def __init__(self, folder: Path, template: str | None = None, turns: Turns = Turns.LAST) -> None:
        self._named = f"--tokenizer {folder}"
        try:
            import transformers  # noqa: F401 (imported before `limited` counts its time)
            from transformers.utils.chat_template_utils import render_jinja_template
        except ImportError as error:
            raise ConfigError(f"{self._named}: needs the package transformers; install moe_dist[hf]") from error
        for path in sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")]):
            if not path.is_file() and not path.is_dir():  # transformers would wait for a pipe that nobody writes
                raise DataError(f"{path}: is no regular file; copy or download it again")
            if path.suffix not in (".json", ".jinja", ".txt", ".model"):
                continue
            is_small = path.name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
            most = MAX_TEMPLATE_BYTES if path.suffix == ".jinja" else MAX_ADDED_BYTES if is_small else MAX_BYTES
            if path.stat().st_size > most:
                raise DataError(f"{path}: {path.stat().st_size:,} bytes, too large to be of a tokenizer; remove the file")
        problem = f"{self._named}: copy or download its files again, because transformers cannot read it"
        with tokenizer_errors(problem):
            if (folder / "tokenizer.json").exists():
                checked_tokenizer(folder / "tokenizer.json")
            outside = outside_keys(folder)
        if outside:
            raise DataError([f"{folder}: {each}; remove the key" for each in outside])
        limited(lambda: _load(folder) is None, problem, seconds=10)()  # fields of several files can make it endless
        with tokenizer_errors(problem):
            found = _load(folder)
        if not getattr(found, "is_fast", False):
            problem = (
                f"{self._named}: {type(found).__name__} does not tell which characters a token covers, which loss masks "
                "need; give a folder with a tokenizer.json"
            )
            raise ConfigError(problem, see=GUIDE)
        if found.eos_token_id is None:
            problem = (
                f"{self._named}: eos_token is null, and each document needs an end; set eos_token in tokenizer_config.json"
            )
            raise ConfigError(problem, see=GUIDE)
        found.backend_tokenizer.no_truncation()
        found.backend_tokenizer.no_padding()
        self._tokenizer = found
        self._template = None if template is None else _read(Path(template))
        self._templates: dict[bool, tuple[str, bool]] = {}
        self._specials: dict[str, Any] = found.special_tokens_map
        self._render_template: Any = render_jinja_template
        self._added = {str(token) for token in found.added_tokens_decoder.values()}
        self._turns = turns
        self.parts: tuple[str, ...] = ("text",)  # types of the parts that contents may have
        self.size = max(found.get_vocab().values()) + 1
        self.eos_id = int(found.eos_token_id)
        self.pad_id = self.eos_id if found.pad_token_id is None else int(found.pad_token_id)
        self._check_fit(folder / "config.json")

    def text(self, text: str, where: str) -> Document:
        """Returns the document of a text. It has the text's tokens, the special tokens that the tokenizer puts around a
        text, and then the end token. Names of special tokens inside the text are encoded as plain text."""
        with tokenizer_errors(f"{where}: {self._named} fails on it"):
            ids = self._tokenizer(text, split_special_tokens=True)["input_ids"]
        ids += [self.eos_id] * (ids[-1:] != [self.eos_id])
        return Document(np.array(ids, np.int64), np.zeros(len(ids), bool))

    def conversation(self, row: dict[str, Any], where: str) -> Conversation:
        """Encodes a conversation. Tokens that an assistant writes are labels; all other tokens are prompt.

        Args:
            row: An object with the key `messages`, a list of objects with a `role`, and optionally the key `tools`, a list
                of JSON schemas or the JSON text of such a list. Other keys are ignored.
            where: Place of the row, for error texts.

        Raises:
            ConfigError: the chat template is missing or invalid, or leaves jinja's sandbox.
            DataError: the conversation is malformed, it has no text of an assistant, or the template fails for it.
        """
        messages, tools = _checked_messages(row, self.parts, where), _checked_tools(row, where)
        template, is_marked = self._template_for(tools, where)
        finder = TurnFinder(partial(self._rendered, template, tools), self._added)
        try:
            if is_marked:
                text, spans = self._marked(template, tools, messages)
                found = marked_turns(messages, text, spans, finder)
            else:
                found = rendered_turns(messages, finder, self._turns)
        except UntoldTurnError as error:
            problem = (
                f"{where}: messages.{error.number}: the chat template of {self._named} has no {{% generation %}} block, "
                f"and it writes this turn so that the assistant's tokens cannot be told: {_WAY_OUT}"
            )
            raise DataError(problem, see=GUIDE) from error
        except (SecurityError, TemplateSyntaxError) as error:
            what = "leaves jinja's sandbox" if isinstance(error, SecurityError) else "is no valid jinja template"
            problem = f"{self._named}: its chat template {what}: {error}; correct it, and pass it with --chat-template FILE"
            raise ConfigError(problem, see=GUIDE) from error
        except RecursionError as error:
            problem = f"{where}: values are nested too deeply; make them flatter, or remove the row"
            raise DataError(problem, see=GUIDE) from error
        except Exception as error:  # a template calls filters and methods, which raise errors of any kind
            problem = (
                f"{where}: the chat template of {self._named} fails on messages: {type(error).__name__}: {error}; correct "
                "the conversation, or pass another template with --chat-template FILE"
            )
            raise DataError(problem, see=GUIDE) from error
        documents = [self._document(each, where) for each in found]
        if not documents or any(document.prompt is None or document.prompt.all() for document in documents):
            roles = ", ".join(each["role"] for each in messages)
            problem = (
                f"{where}: messages has the roles {roles}, and the chat template marks no token as an assistant's, so that "
                "nothing can be learned; add an assistant's answer, or remove the row"
            )
            raise DataError(problem, see=GUIDE)
        notes = check_losses(found[-1].messages, tools, found[-1].text, where)
        return Conversation(
            tuple(documents), tuple(dict.fromkeys([*(note for each in found for note in each.notes), *notes]))
        )

    def _template_for(self, tools: Any, where: str) -> tuple[str, bool]:
        """Returns the chat template, and whether it has {% generation %} blocks. Some tokenizers have a separate
        template for tools."""
        with_tools = tools is not None
        if with_tools not in self._templates:
            try:
                template = self._tokenizer.get_chat_template(self._template, tools)
            except ValueError as error:
                problem = f"{self._named}: has no chat template for this ({where}); pass one with --chat-template FILE"
                raise ConfigError(problem, see=GUIDE) from error
            self._templates[with_tools] = template, _MARKS.search(template) is not None
        return self._templates[with_tools]

    def _document(self, rendered: Rendered, where: str) -> Document:
        """Encodes a rendered text. As in transformers, a token is a label if it covers a character of a span."""
        backend = self._tokenizer.backend_tokenizer
        backend.encode_special_tokens = False
        with tokenizer_errors(f"{where}: {self._named} fails on it"):
            found = backend.encode(rendered.text, add_special_tokens=False)
        prompt = np.ones(len(found.ids), bool)
        offsets = np.array(found.offsets, np.int64).reshape(-1, 2)
        for first, last in rendered.spans:
            prompt &= (offsets[:, 0] >= last) | (offsets[:, 1] <= first)
        return Document(np.array(found.ids, np.int64), np.zeros(len(prompt), bool), prompt)

    def _marked(self, template: str, tools: Any, messages: Messages) -> tuple[str, list[Span]]:
        """Returns the rendered text, and the spans of characters that {% generation %} blocks write."""
        texts, spans = self._render_template(
            [messages],
            tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._specials,
        )
        return texts[0], spans[0]

    def _rendered(self, template: str, tools: Any, messages: Messages, *, prompt: bool = False) -> str:
        texts, _ = self._render_template(
            [messages], tools, chat_template=template, add_generation_prompt=prompt, **self._specials
        )
        return texts[0]

    def _check_fit(self, path: Path) -> None:
        if not path.is_file():
            return
        try:
            rows = read_json(path, most_bytes=MAX_BYTES).get("vocab_size", self.size)
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: no JSON object ({error}); copy or download it again") from error
        if isinstance(rows, int) and rows < self.size:
            raise DataError(
                f"{self._named}: gives ids up to {self.size - 1}, but config.json beside it has vocab_size={rows}; it is "
                "another model's tokenizer, or the model's embedding must grow: give the folder of a model with its own "
                "tokenizer",
                see=GUIDE,
            )


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with offline():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _read(path: Path) -> str:
    try:
        return read_regular(path, most_bytes=MAX_TEMPLATE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path}: cannot be read as UTF-8: {error}; name a file of a template") from error


def _checked_messages(row: dict[str, Any], types: Sequence[str], where: str) -> list[dict[str, Any]]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        shown = "is missing" if messages is None else f"is {json.dumps(messages)[:80]}"
        raise DataError(f'{where}: messages {shown}; it must be a list like [{{"role": "user", "content": "..."}}, ...]')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            shown = json.dumps(message)[:80]
            raise DataError(f'{where}: messages.{number} is {shown}; it must be an object with a "role" that is a string')
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") not in types:
                raise DataError(
                    f"{where}: messages.{number}.content has {json.dumps(part)[:80]}; only parts of type "
                    f"{' and '.join(types)} can be encoded: remove the others, or the row"
                )
    return messages


def _checked_tools(row: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """Returns row["tools"], or None. Tools may be JSON text, because a table's column has one type for all rows."""
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: tools is a text that is no JSON ({error}); correct it, or remove the key") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{where}: tools is {json.dumps(tools)[:80]}; it must be a list of objects (JSON schemas)")
    return tools
