"""Drift compares single tokens only if both traces have the same text. Also experts per token by loss, and small
drawings."""

import re
from dataclasses import replace

import numpy as np

from moe_dist.monitor.report.drawing import short
from moe_dist.monitor.report.panels import drift
from moe_dist.monitor.report.routing import Routing, Subject, Tokens
from moe_dist.monitor.report.token_panels import coactivation, compute_maps, experts_a_token
from tests.unit.monitor.conftest import draw_groups
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
    token_T[31] += 1  # this token is in the second of three sequences
    assert "the same 60 tokens" in drifted(routing, {"token_T": token_T})
    assert "no sequence in common" in drifted(routing, {"token_T": tokens_of(routing).token_T + 1})


def test_tokens_of_experts_that_choose_may_take_more_than_top_k() -> None:
    """Groups with top_k 1 and no null experts, whose tokens have four ids. All four are shown, as with top_k 4."""
    plain = draw_groups(2, num_experts=8, num_null=0, top_k=4)
    routing = draw_routing(plain)
    placement = replace(routing.placement, groups=tuple(replace(group, top_k=1) for group in plain))
    chosen = Subject(replace(routing, placement=placement), None, [], ())
    assert coactivation(chosen) == coactivation(Subject(routing, None, [], ())) != "<p>No token takes two experts.</p>"
    assert compute_maps(chosen) == compute_maps(Subject(routing, None, [], ()))
    one = replace(tokens_of(routing), ids_TLK=tokens_of(routing).ids_TLK[:, :, :1])
    assert coactivation(replace(chosen, routing=replace(routing, tokens=one))) == "<p>No token takes two experts.</p>"


def test_experts_a_token_by_its_loss() -> None:
    routing = draw_routing(tokens=90)
    loss_T = np.tile([0.0, 0.25, 0.5, 3.0, 8.0, np.nan], 15).astype(np.float16)
    tokens = replace(tokens_of(routing), loss_T=loss_T)
    page = experts_a_token(Subject(replace(routing, tokens=tokens), None, [], ()))
    picture = page.split("By loss.</b>")[0].split("<svg")[-1]
    count_TL = ((tokens.ids_TLK >= 0) & (tokens.ids_TLK < routing.placement.num_experts)).sum(2)
    wanted = []
    for m, name in enumerate(routing.modalities):
        for low, high in ((0, 0.5), (0.5, 1), (1, 2), (2, 4), (4, 8), (8, np.inf)):
            rows = (tokens.modality_T == m) & (loss_T >= low) & (loss_T < high)
            words = f"{name}, {low:g} to {high:g} nats" if high < np.inf else f"{name}, {low} nats or more"
            if rows.any():
                wanted += [words, f"{short(count_TL[rows].mean())} {rows.sum()}"]
    texts = re.findall(r"<text[^>]*>(.*?)</text>", picture)
    assert [re.sub("<[^>]*>", "", text) for text in texts] == wanted
    assert "By loss." not in experts_a_token(Subject(routing, None, [], ()))
