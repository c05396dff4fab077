"""What is shown of layers that compute a share of the tokens alone, against loops and by hand."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from moe_dist.monitor.metrics import Record, depth_line, evaluation_scalars
from moe_dist.monitor.pictures import Subject
from moe_dist.monitor.sinks.console import ConsoleSink
from moe_dist.monitor.sinks.sink import SinkContext
from moe_dist.monitor.sinks.tensorboard import TensorBoardSink
from moe_dist.monitor.statistics import DepthStatistics, EvaluationResult
from moe_dist.monitor.tags import MAX_SCALARS, curve_of
from tests.unit.monitor.conftest import DEPTHS, MODALITIES

MakeRecord = Callable[..., Record]

HELD_OUT = replace(DEPTHS, taken_LG=np.array([[8, 0], [100, 60]]), agreed_L=None, weight_L=None)
RESULT = EvaluationResult(3, {"text": 3.0}, {"text": 4}, mixture_of_depths=HELD_OUT)


def test_scalars_by_hand(make_record: MakeRecord) -> None:
    scalars = make_record(1, mixture_of_depths=DEPTHS).scalars
    assert {tag: value for tag, value in scalars.items() if tag.startswith("mixture_of_depths/")} == pytest.approx(
        {
            "mixture_of_depths/computed/text": 46 / 200,
            "mixture_of_depths/computed/image": 34 / 120,
            "mixture_of_depths/agreement": 272 / 320,
            "mixture_of_depths/gate_weight": 52 / 80,
        }
    )
    assert evaluation_scalars(RESULT, MODALITIES, 2) == {
        "eval/text": 3.0,
        "mixture_of_depths/load_over_target": pytest.approx((8 / 160 + 1.0) / 2 / 0.25),
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_layers_equal_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens_LG = np.tile(rng.integers(1, 50, 3), (4, 1))
    taken_LG = rng.integers(0, tokens_LG + 1)
    agreed_L, weight_L = rng.integers(0, tokens_LG.sum(1)), rng.random(4) * taken_LG.sum(1)
    line = depth_line(DepthStatistics((0, 2, 4, 6), 0.5, ("a", "b", "c"), tokens_LG, taken_LG, agreed_L, weight_L))
    assert (line["layers"], line["target"]) == ([0, 2, 4, 6], 0.5)
    for layer in range(4):
        tokens = taken = 0
        for g, name in enumerate("abc"):
            tokens += int(tokens_LG[layer, g])
            taken += int(taken_LG[layer, g])
            assert line["computed_by_group"][name][layer] == int(taken_LG[layer, g]) / int(tokens_LG[layer, g])
        assert line["computed"][layer] == taken / tokens
        assert line["agreement"][layer] == int(agreed_L[layer]) / tokens
        assert line["gate_weight"][layer] == pytest.approx(weight_L[layer] / taken)


def test_tensorboard_has_curves_charts_and_the_map(tmp_path: Path, subject: Subject, make_record: MakeRecord) -> None:
    deep = replace(subject, mixture_of_depths=True)
    sink = TensorBoardSink(SinkContext(tmp_path, subject=deep, modalities=MODALITIES), pictures_every=2)
    for step in (1, 2, 3):
        sink.step(make_record(step, mixture_of_depths=DEPTHS))
    sink.evaluation(RESULT, evaluation_scalars(RESULT, MODALITIES, 2))
    sink.close()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = accumulator.Tags()
    in_text = EventAccumulator(str(tmp_path / "tensorboard" / "text")).Reload().Tags()["scalars"]
    assert "mixture_of_depths/computed" in in_text
    assert {
        "mixture_of_depths/agreement",
        "mixture_of_depths/gate_weight",
        "mixture_of_depths/load_over_target",
    } < set(tags["scalars"])
    assert len(tags["scalars"]) + 2 * len(in_text) <= MAX_SCALARS
    assert {"mixture_of_depths/layers", "moe/null_fraction", "moe/load_imbalance", "moe/capacity_used"} < set(
        tags["images"]
    )
    assert "moe/experts_per_token" not in tags["images"]
    assert not set(tags["images"]) & set(tags["scalars"]), "TensorBoard shows one kind under a tag"
    assert [event.step for event in accumulator.Images("mixture_of_depths/layers")] == [2, 3]
    page = layout_pb2.Layout.FromString(accumulator.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charted = {tag for category in page.category for chart in category.chart for tag in chart.multiline.tag}
    assert {tag for tag in tags["scalars"] if tag.startswith(("mixture_of_depths/", "moe/load_imbalance"))} <= charted
    measured_elsewhere = {"eval/.*", "perf/balance_efficiency", "moe/balance_efficiency_by_count"}
    known = {curve_of(tag)[1] for tag in make_record(1, mixture_of_depths=DEPTHS).scalars}
    assert charted - measured_elsewhere <= known | {"mixture_of_depths/load_over_target"}


def test_the_console_says_what_the_held_out_tokens_met(make_record: MakeRecord) -> None:
    file = io.StringIO()
    sink = ConsoleSink(SinkContext(Path(), total_steps=4), console=Console(file=file))
    sink.evaluation(RESULT, {})
    sink.evaluation(replace(RESULT, mixture_of_depths=None), {})
    assert [line for line in file.getvalue().splitlines() if "depths" in line] == [
        "mixture-of-depths layers computed 0.525 of the held-out tokens, target 0.25 "
        "(layers 0.050 to 1.000; text 0.540, image 0.500)"
    ]
