"""The cost of a sequence agrees with the FLOPs of the whole model, and sequences may change their micro-batch only if no
loss term is computed per micro-batch."""

from pathlib import Path
from typing import Any

import pytest

from moe_dist.plan.flops import forward_flops
from moe_dist.train.build.dealing import build_dealing, sequence_costs
from tests.support.tiny import tiny_config

WINDOWS = {"model.sliding_window": 5, "model.sliding_layers": [0]}
TARGET = {
    "model.moe.router.selection_bias": True,
    "model.moe.balance": [{"kind": "active_experts", "target": {"text": 0.5}, "rate": 0.1}],
}


@pytest.mark.parametrize("changes", [{}, WINDOWS, TARGET], ids=["plain", "window", "target"])
def test_the_costs_are_the_models_flops(changes: dict[str, Any]) -> None:
    config = tiny_config(Path("none"), Path("runs"), changes)
    costs = sequence_costs(config, ("image", "text"))
    taken = {"text": 0.5 if "model.moe.balance" in changes else 2 * 3 / 4, "image": 2 * 2 / 4}
    for length in (1, 2, 4, 5, 6, 31):
        parts = (
            forward_flops(config.model, seq_len=length, experts_per_token=taken, token_share=share).total * length
            for share in ({"text": 0.0, "image": 0.0}, {"text": 0.0, "image": 1.0}, {"text": 1.0, "image": 0.0})
        )
        none, image, text = parts
        assert costs.document_S[length] == pytest.approx(none, rel=1e-12)
        assert length * costs.expert_M == pytest.approx([image - none, text - none], rel=1e-9)
    assert costs.document_S[0] == 0.0


def test_sequences_change_their_micro_batch_only_without_its_terms() -> None:
    def mix(**changes: Any) -> bool:
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        dealing = build_dealing(
            tiny_config(Path("none"), Path("runs"), {"rank_balance.dealing": True, **changes}), ["text"]
        )
        return dealing.mix

    off: dict[str, Any] = {"loss__balance__schedule": [[0, 0.0]]}
    alone: dict[str, Any] = {"loss__balance__scope": "micro_batch"}
    assert build_dealing(tiny_config(Path("none"), Path("runs")), ["text"]) is None
    assert mix(loss__z=1e-3)  # allowed, because loss.balance.scope=step
    assert mix(**alone, **off)
    assert not mix(**alone)
    assert not mix(**alone, loss__balance__schedule=[[0, 0.0], [9, 0.1]])
    assert not mix(**alone, **off, loss__z=1e-3)
