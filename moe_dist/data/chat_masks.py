"""Finds the assistants' texts in a rendered conversation, for chat templates without {% generation %} blocks.

To find an assistant's text, the earlier messages are rendered with the generation prompt. The text is what the turn adds.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any, Protocol

Span = tuple[int, int]  # index of the first character, and of the character after the last
Messages = Sequence[dict[str, Any]]
_QUESTION = {"role": "user", "content": "x"}


class Render(Protocol):
    """Renders messages with the chat template. `prompt` appends the generation prompt, which begins an assistant's turn."""

    def __call__(self, messages: Messages, *, prompt: bool = False) -> str: ...


class TurnFinder:
    """Finds the text of one turn in the rendered text of a conversation.

    Args:
        render: Renders messages of this conversation.
        added: Texts of the tokens that the tokenizer never splits, such as <|im_end|>.
    """

    def __init__(self, render: Render, added: Collection[str]) -> None:
        self.render, self._added = render, tuple(added)
        token = "|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)"
        self._edge = re.compile(rf"\n|{token}")
        self._closing = re.compile(rf"(?:\s|{token})*")
        self._stop = re.compile(rf"\s*(?:{token})")

    def find(self, text: str, messages: Messages, number: int) -> Span | None:
        """Returns the span of characters that the assistant of messages[number] writes, including the token that ends the
        turn. `text` is the rendering of `messages`.

        Returns None if later messages change how the template renders the messages up to this one. Calls `render` twice, or
        four times if the template rewrites turns.
        """
        first = self._start(text, messages, number)
        last = None if first is None else self._end(text, messages, number, first)
        if first is None or last is None or last <= first:
            return None
        # In some templates only the first token of the next message, such as <|user|>, ends a turn.
        follow = None if self.stops(text[first:last]) else self._stop.match(text, last)
        return first, last if follow is None else follow.end()

    def stops(self, turn: str) -> bool:
        """Returns whether the text of a turn ends with a token that is never part of an answer."""
        return turn.rstrip().endswith(self._added)

    def stop_after(self, text: str, messages: Messages) -> str:
        """Returns the text of the token that ends the last turn, if in this template the first token of a message ends the
        previous turn; '' if the template has no such token."""
        answer = {"role": "tool", "content": "x"} if messages[-1].get("tool_calls") else _QUESTION
        longer = _attempt(self.render, [*messages, answer])
        found = self._stop.match(longer, len(text)) if longer is not None and longer.startswith(text) else None
        return "" if found is None else found.group()

    def _start(self, text: str, messages: Messages, number: int) -> int | None:
        before = _attempt(self.render, messages[:number], prompt=True) if number else None
        if before is None:
            return self._first_start(text, messages, number)
        if text.startswith(before):
            return len(before)
        # The generation prompt may end with text that the rendered turn lacks, for example <think>.
        opened = _attempt(self.render, messages[:number])
        shared = self._shared(before, text)
        return shared if opened is not None and shared > self._shared(opened, before) else None

    def _first_start(self, text: str, messages: Messages, number: int) -> int | None:
        """Returns the index where the first assistant's turn starts, if the messages before it cannot be rendered alone."""
        if any(message["role"] == "assistant" for message in messages[:number]):
            return None
        bare, asked = _attempt(self.render, [_QUESTION]), _attempt(self.render, [_QUESTION], prompt=True)
        if bare is None or asked is None:
            return None
        prompt = asked[self._shared(bare, asked) :]
        if not prompt:
            other = _attempt(self.render, [*messages[:number], messages[number] | {"role": "user"}])
            return None if other is None else self._shared(other, text)
        earlier = messages[number - 1].get("content") if number else ""
        begin = text.find(earlier) + len(earlier) if isinstance(earlier, str) else 0
        for length in (len(prompt), *(edge.end() for edge in reversed([*self._edge.finditer(prompt)]))):
            if (at := text.find(prompt[:length], begin)) >= 0:
                return at + length
        return None

    def _end(self, text: str, messages: Messages, number: int, first: int) -> int | None:
        if number == len(messages) - 1:
            return len(text)
        after = _attempt(self.render, messages[: number + 1])
        if after is None:
            return None
        if text.startswith(after):
            return len(after)
        # After the end token of the turn, the template may end the conversation with another token, such as <|endoftext|>.
        shared = self._shared(after, text)
        closed = self._closing.fullmatch(after, shared) and self.stops(text[first:shared])
        return shared if closed else None

    def _shared(self, one: str, other: str) -> int:
        """Returns the length of the longest common prefix that ends at the end of `one`, an added token or a line."""
        pairs = enumerate(zip(one, other, strict=False))
        shared = next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
        if shared == len(one):
            return shared
        return max((edge.end() for edge in self._edge.finditer(one, 0, shared)), default=0)


def _attempt(render: Render, messages: Messages, *, prompt: bool = False) -> str | None:
    """Returns the rendering, or None if the template rejects a conversation with only these messages."""
    try:
        return render(messages, prompt=prompt)
    except Exception:  # a template calls filters and methods, which raise errors of any kind
        return None
