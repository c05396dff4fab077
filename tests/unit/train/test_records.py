"""Tests records and pictures of short runs on one rank whose routers choose a number of experts for each token."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_dist.monitor.metrics import Record
from moe_dist.monitor.sinks.tensorboard import Window
from moe_dist.placement.parameter_names import group_module
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.train.loop.trainer import Trainer
from tests.support.cover import rest_full
from tests.support.one_rank import OneRank, world_of_one


class Kept:
    """A sink that keeps the records of steps."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def step(self, record: Record) -> None:
        self.records.append(record)

    def evaluation(self, *_: Any) -> None: ...


@contextmanager
def started(data: Path, root: Path, **changes: Any) -> Iterator[tuple[Trainer, Kept, OneRank]]:
    """Starts a run with its configured sinks, and with a sink that keeps the records."""
    kept: Any = Kept()
    with world_of_one():
        one = OneRank(data, root, **changes)
        with one.trainer([kept]) as trainer:
            yield trainer, kept, one


def test_a_record_has_the_target_of_its_step(tiny_data: Path, tmp_path: Path) -> None:
    """In the first three updates the schedule multiplies the target 1.2 by 1.5. The ramp goes from 2 experts per token
    to this 1.8 in two updates, so the targets are 2.0, 1.9 and 1.8. The third step is skipped, so step 4 makes the
    third update. From the fourth update on the target is 1.2."""
    controller = {"kind": "active_experts", "target": {"text": 1.2}, "rate": 0.5, "ramp_steps": 2}
    changes = {
        "model.moe.balance": [{**controller, "schedule": [[0, 1.5], [3, 1.0]]}],
        "model.moe.router": {"kind": "top_p"},
    }
    errors = []
    with started(tiny_data, tmp_path, **changes) as (trainer, kept, one):
        model, group = one.training.parallel.model, one.plan.placement.groups[0]
        weight, router = next(iter(model.parameters())), model.moe_modules()[0].router
        bias = router.get_submodule(group_module(group.name)).get_buffer("bias")
        for number in range(1, 7):
            good, before = weight.detach().clone(), bias.clone()
            if number == 3:
                weight.data.fill_(math.nan)
            trainer._step()
            if number == 3:
                weight.data.copy_(good)
            errors.append(float((bias - before)[0]) / 0.5 * 2 * 3)
    targets = [2.0, 1.9, 1.8, 1.8, 1.2, 1.2]
    assert [record.skipped for record in kept.records] == [number == 3 for number in range(1, 7)]
    assert [record.load["text"]["target"] for record in kept.records] == pytest.approx(targets)
    for record, error in zip(kept.records, errors, strict=True):
        achieved = record.arrays["choices_LC"][0, :3].sum() / record.arrays["tokens_LG"][0, 0]
        assert error == (0.0 if record.skipped else pytest.approx(record.load["text"]["target"] - achieved, abs=1e-5))
    window = Window()
    for record in kept.records:
        window.add(record)
    tokens_6 = [record.arrays["tokens_LG"][0, 0] for record in kept.records]
    aimed_LG = window.take()[0]["aimed_LG"]
    assert aimed_LG[:, 0] == pytest.approx(np.full(2, np.dot(targets, tokens_6)))
    assert np.isnan(aimed_LG[:, 1]).all(), "no controller holds the image group"


CHOOSING = {"model.moe.groups.text.num_null": 0, "model.moe.groups.image.num_null": 0, "loss.balance.schedule": [[0, 0.0]]}
CONTROLLED = {"model.moe.balance": [{"kind": "active_experts", "target": {"text": 1.2}, "rate": 0.5, "ramp_steps": 2}]}
ROUTERS: dict[str, dict[str, Any]] = {
    "expert_threshold": {"model.moe.router": {"kind": "expert_threshold", "warmup_steps": 1}, **CHOOSING},
    "relu": {"model.moe.router": {"kind": "relu"}, **CONTROLLED},
}


@pytest.mark.parametrize("kind", rest_full(ROUTERS))
def test_pictures_are_drawn(tiny_data: Path, tmp_path: Path, kind: str) -> None:
    """Pictures are drawn at steps 2 and 3, and the compute map at an evaluation."""
    sinks = [{"kind": "console", "every": 1}, {"kind": "jsonl"}, {"kind": "tensorboard", "pictures_every": 2}]
    quiet = {"evaluation.balance_efficiency": False, "evaluation.ablate_experts": False}
    changes = {"monitor.sinks": sinks, "monitor.compute_map": {"sequences": 2}, **quiet, **ROUTERS[kind]}
    with started(tiny_data, tmp_path, **changes) as (trainer, kept, one):
        folder = RunFolder.of(one.plan.config).path
        for _ in range(3):
            trainer._step()
        trainer._evaluate(final=False)
    accumulator = EventAccumulator(
        str(next(folder.rglob("events.out.tfevents*")).parent), size_guidance={"images": 0}
    ).Reload()
    wanted = {"moe/load/text", "moe/load/image", "moe/relative_entropy"}
    wanted |= {"moe/load_over_target", "moe/null_fraction"} if kind != "expert_threshold" else set()
    tags = set(accumulator.Tags()["images"])
    assert tags == wanted | {"moe/compute_map"} | ({"moe/idle_fraction"} if kind == "expert_threshold" else set())
    assert all([event.step for event in accumulator.Images(tag)] == [2, 3] for tag in wanted)
    numbers = {
        int(each) for r in kept.records for each in r.arrays["choices_LC"][:, :3].sum(1) % r.arrays["tokens_LG"][:, 0]
    }
    assert numbers != {0}, "the number of experts differs between tokens"
