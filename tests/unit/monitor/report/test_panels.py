"""The panel of the drift compares single tokens only where both traces have the same text."""

from dataclasses import replace

import numpy as np

from moe_dist.monitor.report.panels import drift
from moe_dist.monitor.report.routing import Routing, Subject, Tokens
from moe_dist.monitor.trace.foreign import NO_ID
from tests.unit.monitor.report.conftest import draw_routing


def drifted(routing: Routing, change: dict[str, np.ndarray]) -> str:
    against = replace(routing, tokens=replace(tokens_of(routing), **change))
    return drift(Subject(routing, against, [], ()))


def tokens_of(routing: Routing) -> Tokens:
    assert routing.tokens is not None
    return routing.tokens


def test_a_sequence_with_another_text_is_left_out() -> None:
    routing = draw_routing(tokens=90)
    assert "the same 90 tokens" in drifted(routing, {})
    token_T = tokens_of(routing).token_T.copy()
    token_T[31] += 1  # in the second of three sequences
    assert "the same 60 tokens" in drifted(routing, {"token_T": token_T})
    assert "no sequence in common" in drifted(routing, {"token_T": tokens_of(routing).token_T + 1})


def test_tokens_without_ids_are_not_compared() -> None:
    routing = draw_routing(tokens=90)
    nameless = replace(routing, tokens=replace(tokens_of(routing), token_T=np.full(90, NO_ID)))
    assert "with their ids" in drifted(nameless, {})
