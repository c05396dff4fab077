"""Encodes conversations and texts as documents, by the tokenizer of a Hugging Face folder.

Token ids and labels of a conversation equal transformers' `apply_chat_template(..., return_dict=True,
return_assistant_tokens_mask=True)`. Chat templates run in jinja's sandbox, as in transformers, and in a process with a time
limit, which the sandbox lacks. The template's {% generation %} blocks mark the labels. For a template without generation
blocks, the labels are the text by which each assistant turn extends the earlier turns and their generation prompt
(`_by_turns`).
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import SecurityError, TemplateSyntaxError

from moe_dist.data.picture_coding import Document
from moe_dist.data.timed import TimedCalls
from moe_dist.errors import ConfigError, DataError

GUIDE = "docs/data.md"
TEMPLATE_SECONDS = 60  # time limit for one conversation; a usual template takes less than a thousandth of it
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the pattern by which transformers finds {% generation %}
_WAY_OUT = "put {% generation %} and {% endgeneration %} around what an assistant writes, and pass it with --chat-template"


class HubTokenizer:
    """The tokenizer of a Hugging Face folder. Runs no code of the folder, and downloads nothing.

    Args:
        folder: Folder with the tokenizer's files. If it also has a config.json, the tokenizer must fit that model.
        template: File with the chat template to use; None for the tokenizer's own template.

    Attributes:
        size: Largest token id + 1.
        pad_id, eos_id: Ids of padding, and of the end of a text.

    Raises:
        ConfigError: transformers is missing, the tokenizer has no end token or no offsets, or `template` is no file.
        DataError: the tokenizer cannot be read, or does not fit the model in the folder.
    """

    def __init__(self, folder: Path, template: str | None = None) -> None:
        self._named = f"--tokenizer {folder}"
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ConfigError(f"{self._named}: needs the package transformers; install moe_dist[hf]") from error
        try:
            found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers and tokenizers raise many classes, also bare Exception
            problem = f"{self._named}: transformers cannot read it: {error}; copy or download the tokenizer's files again"
            raise DataError(problem) from error
        if not found.is_fast:
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
        self._tokenizer = found
        self._template = None if template is None else _read(Path(template))
        self._marks = tuple(str(token) for token in found.added_tokens_decoder.values())
        self.size = max(found.get_vocab().values()) + 1
        self.eos_id = int(found.eos_token_id)
        self.pad_id = self.eos_id if found.pad_token_id is None else int(found.pad_token_id)
        self._check_fit(folder / "config.json")
        self._encoded = TimedCalls(self._encode, TEMPLATE_SECONDS)

    def text(self, text: str) -> Document:
        """Returns the document of a text: its tokens, with the special tokens that the tokenizer puts around a text, then
        the end token. Names of special tokens in the text are encoded as plain text."""
        ids = self._tokenizer(text, split_special_tokens=True)["input_ids"]
        ids += [self.eos_id] * (ids[-1:] != [self.eos_id])
        return Document(np.array(ids, np.int64), np.zeros(len(ids), bool))

    def conversation(self, row: dict[str, Any], where: str) -> Document:
        """Returns the document of a conversation. Tokens of assistants are labels; all other tokens are prompt.

        Args:
            row: `messages`, a list of objects with a `role`, and optionally `tools`, a list of JSON schemas or its JSON
                text. Other keys are not read.
            where: Place of the row, for error texts.

        Raises:
            ConfigError: the chat template is missing or invalid, leaves jinja's sandbox, or does not end in time.
            DataError: the conversation is malformed, has no text of an assistant, or the template fails on it.
        """
        try:
            return self._encoded({key: row[key] for key in ("messages", "tools") if key in row}, where)
        except (TimeoutError, ChildProcessError) as error:
            problem = (
                f"{where}: the chat template of {self._named} {error} on messages; correct its loops or its use of memory, "
                "and pass it with --chat-template FILE, or remove the row"
            )
            raise ConfigError(problem, see=GUIDE) from error
        except RecursionError as error:
            raise DataError(
                f"{where}: values are nested too deeply; make them flatter, or remove the row", see=GUIDE
            ) from error

    def _encode(self, row: dict[str, Any], where: str) -> Document:
        messages, tools = _checked_messages(row, where), _checked_tools(row, where)
        try:
            template = self._tokenizer.get_chat_template(self._template, tools)
        except ValueError as error:
            problem = f"{self._named}: has no chat template for this ({where}); pass one with --chat-template FILE"
            raise ConfigError(problem, see=GUIDE) from error
        try:
            ids, labels = (
                self._by_marks(messages, tools) if _MARKS.search(template) else self._by_turns(messages, tools, where)
            )
        except DataError:
            raise
        except (SecurityError, TemplateSyntaxError) as error:
            what = "leaves jinja's sandbox" if isinstance(error, SecurityError) else "is no valid jinja template"
            problem = f"{self._named}: its chat template {what}: {error}; correct it, and pass it with --chat-template FILE"
            raise ConfigError(problem, see=GUIDE) from error
        except Exception as error:  # a template calls filters and methods, which raise errors of any kind
            problem = (
                f"{where}: the chat template of {self._named} fails on messages: {type(error).__name__}: {error}; correct "
                "the conversation, or pass another template with --chat-template FILE"
            )
            raise DataError(problem, see=GUIDE) from error
        if not any(labels):
            roles = ", ".join(each["role"] for each in messages)
            problem = (
                f"{where}: messages has the roles {roles}, and the chat template marks no token as an assistant's, so that "
                "nothing can be learned; add an assistant's answer, or remove the row"
            )
            raise DataError(problem, see=GUIDE)
        return Document(np.array(ids, np.int64), np.zeros(len(ids), bool), ~np.array(labels, bool))

    def _by_marks(self, messages: list[Any], tools: Any) -> tuple[Sequence[int], Sequence[int]]:
        found = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self._template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return found["input_ids"], found["assistant_masks"]

    def _by_turns(self, messages: list[Any], tools: Any, where: str) -> tuple[Sequence[int], Sequence[bool]]:
        """Returns ids and labels for a template without {% generation %} blocks. Labels are the tokens of the text by which
        an assistant's turn extends the text of the earlier turns and their generation prompt. White space after the turn's
        last special token belongs to the template and has no label. Renders the conversation twice for each assistant
        turn."""
        whole, spans = self._rendered(messages, tools), []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._rendered(messages[:number], tools, add_generation_prompt=True) if number else ""
                after = self._rendered(messages[: number + 1], tools)
                if not (after.startswith(before) and whole.startswith(after)):
                    problem = (
                        f"{where}: messages.{number}: the chat template of {self._named} has no {{% generation %}} block, "
                        "and it writes the messages up to here differently if others follow, so that the assistant's "
                        f"tokens cannot be told: {_WAY_OUT}"
                    )
                    raise DataError(problem, see=GUIDE)
                bare = after.rstrip()
                spans.append((len(before), len(bare) if bare.endswith(self._marks) else len(after)))
        found = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        labels = [any(begin < last and end > first for first, last in spans) for begin, end in found["offset_mapping"]]
        return found["input_ids"], labels

    def _rendered(self, messages: list[Any], tools: Any, *, add_generation_prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def _check_fit(self, path: Path) -> None:
        if not path.is_file():
            return
        try:
            rows = json.loads(path.read_bytes()).get("vocab_size", self.size)
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: no JSON object ({error}); copy or download it again") from error
        if isinstance(rows, int) and rows < self.size:
            raise DataError(
                f"{self._named}: gives ids up to {self.size - 1}, but config.json beside it has vocab_size={rows}; it is "
                "another model's tokenizer, or the model's embedding must grow: give the folder of a model with its own "
                "tokenizer",
                see=GUIDE,
            )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path}: cannot be read as UTF-8: {error}; name a file of a template") from error


def _checked_messages(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Returns row["messages"].

    Raises:
        DataError: row["messages"] is no list of objects with a role, or a content has parts that are not text.
    """
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
            if not isinstance(part, dict) or part.get("type") != "text":
                raise DataError(
                    f"{where}: messages.{number}.content has {json.dumps(part)[:80]}; only parts of type text can be "
                    "encoded: remove the others, or the row"
                )
    return messages


def _checked_tools(row: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """Returns row["tools"], or None. Parses tools stored as text, because a table's column has one type for all rows."""
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: tools is a text that is no JSON ({error}); correct it, or remove the key") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{where}: tools is {json.dumps(tools)[:80]}; it must be a list of objects (JSON schemas)")
    return tools
