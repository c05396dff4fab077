"""Divides a conversation into rendered texts to train on, and finds in each text the spans that assistants write.

Most chat templates render a turn in the same way whatever follows it, so one text is enough for all turns. Other templates
drop or rewrite parts of earlier turns, such as reasoning, and a model must not learn to write turns in the rewritten form.
For such a template, the model trains only on the last turn, or on each turn in a separate text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from moe_dist.data.chat_masks import Messages, Span, TurnFinder

REWRITTEN = "the chat template rewrites earlier turns"
NO_STOP = "no token ends an assistant's turn, so that a model does not learn to stop: put one into the chat template"


class Turns(StrEnum):
    """The turns to train on if the template rewrites a conversation's earlier turns."""

    LAST = "last"
    EACH = "each"


@dataclass(frozen=True)
class Rendered:
    """The rendered text of a conversation or of its beginning.

    Attributes:
        messages: The messages that the text contains.
        spans: Spans of characters that are labels, in ascending order.
        notes: Warnings for the user.
    """

    messages: Messages
    text: str
    spans: Sequence[Span]
    notes: tuple[str, ...] = ()


class UntoldTurnError(Exception):
    """Raised if the text that the assistant of messages[number] writes cannot be found."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def marked_turns(messages: Messages, text: str, spans: Sequence[Span], finder: TurnFinder) -> list[Rendered]:
    """Returns the text of a template whose {% generation %} blocks write `spans`; an empty list if there are no spans."""
    stops = any(finder.stops(text[first:last]) for first, last in spans)
    return [Rendered(messages, text, spans, () if stops else (NO_STOP,))] if spans else []


def rendered_turns(messages: Messages, finder: TurnFinder, turns: Turns) -> list[Rendered]:
    """Returns the texts to train on. The list is empty if no message has the role of an assistant.

    Raises:
        UntoldTurnError: an assistant's text cannot be found in the rendered text.
        Exception: from the template.
    """
    assistants = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    whole = finder.render(messages)
    found = [finder.find(whole, messages, number) for number in assistants]
    spans = [span for span in found if span is not None]
    if len(spans) == len(found):
        return [_stopped(whole, spans, messages, finder)] if spans else []
    texts = []
    for number in assistants[-1:] if turns is Turns.LAST else assistants:
        part = messages[: number + 1]
        text = finder.render(part)
        span = finder.find(text, part, number)
        if span is None:
            raise UntoldTurnError(number)
        one = _stopped(text, [span], part, finder)
        texts.append(replace(one, notes=(f"{REWRITTEN}; --turns {turns} applies", *one.notes)))
    return texts


def _stopped(text: str, spans: list[Span], messages: Messages, finder: TurnFinder) -> Rendered:
    """Appends the token that ends the last turn, if the template only writes it at the start of the next message."""
    first, last = spans[-1]
    if finder.stops(text[first:last]):
        return Rendered(messages, text, spans)
    stop = finder.stop_after(text, messages) if last == len(text) else ""
    if not stop:
        return Rendered(messages, text, spans, (NO_STOP,))
    return Rendered(messages, text + stop, [*spans[:-1], (first, last + len(stop))])
