"""Dense models of transformers get experts: LLaVA-MoLE's adapters and MoMa's copies of FFNs. N ranks train as one rank does."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.train.start.resume import Progress
from tests.distributed.test_hosted import LAYOUTS, ONE, initial_difference, steps
from tests.support.dense import MODELS, PICTURED, PINNED
from tests.support.engine_run import built_run, take_steps
from tests.support.hosted import hosted_config
from tests.support.worlds import RankContext

ADAPTERS = {"train.only": "adapters", "optimizer.lr": 0.01}


def layout(name: str, kind: str) -> dict[str, Any]:
    changes = {"pinned": PINNED, "fsdp2": LAYOUTS["ep2, fsdp2, recompute=experts"]}.get(name) or LAYOUTS[name]
    return {**changes, **(ADAPTERS if kind == "mole" else {})}


@pytest.mark.parametrize(
    ("kind", "layout_name"),
    [("moma", "pinned"), ("moma", "fsdp2"), ("copies", "uneven"), ("mole", "uneven"), ("mole", "fsdp2")],
)
@pytest.mark.slow
def test_n_ranks_equal_one(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, kind: str, layout_name: str
) -> None:
    model = MODELS[kind](tmp_path / "dense")
    changes = layout(layout_name, kind)
    one_changes = {**ONE, **(ADAPTERS if kind == "mole" else {})}
    world = changes["parallel.ep"] * changes.get("parallel.edp", 1)
    ((one, ready),) = run_in_world(1, steps, str(tiny_data), str(tmp_path / "1"), model, one_changes)
    results = run_in_world(world, steps, str(tiny_data), str(tmp_path / "n"), model, changes)
    for reports, also in results:
        assert also == ready == (True, False)
        for found, expected in zip(reports, one, strict=True):
            for key in ("loss", "norm", "balance", "z"):
                assert float(found[key]) == pytest.approx(float(expected[key]), rel=1e-9), key
            assert found["choices"].tolist() == expected["choices"].tolist()
    assert any(reports[-1]["rows"]["rows_remote"] > 0 for reports, _ in results)


def begun(rank: RankContext, data: str, root: str, model: Mapping[str, Any], changes: Mapping[str, Any]) -> float:
    """Starts a run from a dense folder, takes two steps and saves. Returns the largest difference between the run's initial
    losses and those of transformers' dense model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.set_num_threads(1)
    with built_run(hosted_config(data, root, model, changes), world_size=rank.world_size) as run:
        saver = run.saver()
        saver.restore()
        family = run.config.model.family
        auto: Any = AutoModelForImageTextToText if family in PICTURED else AutoModelForCausalLM
        own = auto.from_pretrained(model["folder"], dtype=torch.float32).eval()
        if family == "chameleon":  # transformers forbids picture tokens in the output, which this engine trains
            own.model.vocabulary_mapping.__dict__["image_tokens"] = []
        difference = initial_difference(run, own)
        take_steps(run, 0, 2)
        saver.save(Progress(step=2, position=2 * run.config.train.global_batch), durable=True)
        return difference


@pytest.mark.parametrize(
    ("kind", "layout_name"), [("moma", "pinned"), ("copies", "fsdp2"), ("mole", "uneven"), ("mole", "fsdp2")]
)
@pytest.mark.slow
def test_a_run_begins_as_the_dense_model(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, kind: str, layout_name: str
) -> None:
    model, changes = MODELS[kind](tmp_path / "dense"), layout(layout_name, kind)
    world = changes["parallel.ep"] * changes.get("parallel.edp", 1)
    for difference in run_in_world(world, begun, str(tiny_data), str(tmp_path), model, changes):
        assert difference < 2e-6
