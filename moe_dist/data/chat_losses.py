"""Finds contents and tool calls of messages that a chat template omits or prints in another form.

The rendered text must have each content, unchanged or in JSON form. Templates trim contents, so white space is ignored.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from moe_dist.data.chat_masks import Messages
from moe_dist.errors import DataError

REASONING = ("reasoning_content", "reasoning", "thinking")  # transformers passes the reasoning under each of these names


def check_losses(messages: Messages, tools: Sequence[dict[str, Any]] | None, text: str, where: str) -> list[str]:
    """Compares a conversation with its rendering.

    Returns:
        Warnings about tools or reasoning that the template does not print. Many templates omit both on purpose.

    Raises:
        DataError: the template prints a list as Python text, encodes arguments twice, or omits a content or a call.
    """
    printed = _Printed(text)
    for number, message in enumerate(messages):
        if problem := next(_problems(message, printed), None):
            key, found, fix = problem
            raise DataError(f"{where}: messages.{number}.{key}: the chat template {found}; {fix}", see="docs/data.md")
    notes = []
    if names := [
        str(_function(tool).get("name", "")) for tool in tools or () if not printed.has(_function(tool).get("name"))
    ]:
        notes.append(f"the chat template does not print all tools ({', '.join(names)})")
    notes += [f"the chat template does not print {key}" for key in REASONING if not printed.has(messages[-1].get(key))]
    return notes


class _Printed:
    def __init__(self, text: str) -> None:
        self.text, self._bare = text, ""

    def has(self, value: Any) -> bool:
        """Returns whether the text contains the string `value`, ignoring white space; True if `value` is not a string."""
        if not isinstance(value, str) or value.strip() in self.text:
            return True
        self._bare = self._bare or _bare(self.text)
        return any(
            _bare(form) in self._bare
            for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
        )


def _bare(text: str) -> str:
    return "".join(text.split())


def _problems(message: dict[str, Any], printed: _Printed) -> Iterator[tuple[str, str, str]]:
    """Yields (key, what the template does wrong, fix) for each content of a message that is lost or misprinted."""
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    if parts and printed.has(str(parts)):
        yield "content", "prints the list of parts as Python text", "write the content as one string"
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)] if parts else [content]
    for each in texts:
        # Templates drop the part of a content before </think>, which is reasoning.
        if isinstance(each, str) and not printed.has(each.rpartition("</think>")[2]):
            yield "content", f"does not print {each[:40]!r}", "write it as the template expects it, or use another template"
    for at, call in enumerate(message.get("tool_calls") or ()):
        if not isinstance(call, dict):
            continue
        function = _function(call)
        arguments = function.get("arguments")
        if isinstance(arguments, str) and any(printed.has(form) for form in _twice(arguments)):
            key = f"tool_calls.{at}.function.arguments"
            yield key, "encodes this text of JSON a second time", "write the arguments as an object"
        if not all(map(printed.has, [function.get("name"), *_strings(arguments)])):
            yield f"tool_calls.{at}", "does not print this call", "remove the row, or use a template with tool calls"


def _strings(arguments: Any) -> Iterator[str]:
    """Yields the strings in a call's arguments. The function's name would not prove that the call is printed, because the
    list of tools contains the name, too."""
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    for value in arguments.values() if isinstance(arguments, dict) else [arguments]:
        if isinstance(value, str):
            yield value


def _twice(arguments: str) -> list[str]:
    """Returns those JSON encodings of a text that differ from the text itself."""
    forms = {json.dumps(arguments), json.dumps(arguments, ensure_ascii=False)}
    return [form for form in forms if form[1:-1] != arguments]


def _function(call: dict[str, Any]) -> dict[str, Any]:
    found = call.get("function")
    return found if isinstance(found, dict) else call
