"""The simulation of a micro-batch in two halves equals a schedule made by hand."""

from dataclasses import replace

import pytest

from moe_dist.plan.step_model import LayerCost, play
from research.bench.halves import micro_batch_in_halves


def test_two_halves_by_hand() -> None:
    """Attention takes 2, experts take 4, an exchange takes 1. Each entry is a part with its end times in halves A and B.

    forward     attention 2, 4; dispatch 3, 5; experts 8, 12; combine 9, 13; attention 14, 16; dispatch 15, 17;
                experts 20, 24; combine 21, 25; head 35
    backward    combine 36, 37; experts 44, 52; dispatch 45, 53; attention 56, 60; combine 57, 61; experts 68, 76;
                dispatch 69, 77; attention 80, 84
    """
    layer = LayerCost(dense=2.0, own=1.0, others=3.0, hops=(1.0,))
    played = play(micro_batch_in_halves([layer, layer], 10 / 3, [layer, layer]), 1, 1)
    assert played.seconds_S[0] == pytest.approx(84)
    assert played.wire_S[0] == 2 * 2 * 4
    with_sync = replace(layer, sync=1.0, pack=0.5, counts=0.25)
    more = play(micro_batch_in_halves([with_sync, with_sync], 10 / 3, [layer, layer]), 1, 1)
    assert more.busy_SR[0, 0] == pytest.approx(played.busy_SR[0, 0] + 2 * 2 * (1 + 2 * 0.5))
    ffn = LayerCost(dense=2.0, shared=4.0)
    assert play(micro_batch_in_halves([ffn], 10.0, [ffn]), 1, 1).seconds_S[0] == pytest.approx(3 * (2 * 6 + 10))
