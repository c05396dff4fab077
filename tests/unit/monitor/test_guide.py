"""docs/monitoring.md explains every tag, picture and field of the code, and its examples are valid."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from moe_dist.config.schema import MonitorSection
from moe_dist.monitor.metrics import Record
from moe_dist.monitor.pictures import Subject, heat_maps
from moe_dist.monitor.sinks.jsonl import JsonlSink, read_lines
from moe_dist.monitor.sinks.sink import SinkContext
from moe_dist.monitor.sinks.tensorboard import Window
from moe_dist.monitor.statistics import ComputeMap, EvaluationResult
from moe_dist.monitor.tags import DEPTH_MEANING, MEANING
from tests.unit.monitor.conftest import DEPTHS

GUIDE = (Path(__file__).parents[3] / "docs" / "monitoring.md").read_text()


@pytest.mark.parametrize("family", [*MEANING, *DEPTH_MEANING, "mixture_of_depths/layers"])
def test_every_tag_is_explained(family: str) -> None:
    stem = family.split("/{")[0] + ("/<" if "{" in family else "")
    assert f"`{stem}" in GUIDE


def test_every_picture_is_explained(make_record: Callable[..., Record], subject: Subject) -> None:
    window = Window()
    window.add(make_record(1))
    sums, words = window.take()
    for tag, picture in heat_maps(sums, subject, words):
        assert picture.dtype == np.uint8
        assert f"`{re.sub('(text|image)$', '<group>', tag)}`" in GUIDE


def test_every_field_of_a_line_is_explained(tmp_path: Path, make_record: Callable[..., Record]) -> None:
    sink = JsonlSink(SinkContext(tmp_path))
    sink.step(make_record(1, grad_norm=float("inf"), mixture_of_depths=DEPTHS))
    result = EvaluationResult(1, {"text": 1.0}, {"text": 2}, compute_map=ComputeMap({"text": 1.5}, 2))
    sink.evaluation(result, {"eval/text": 1.0})
    section = GUIDE[GUIDE.index("## metrics.jsonl") : GUIDE.index("## Prometheus")]
    for line in read_lines(tmp_path / "metrics.jsonl"):
        for name in [*line, *(each for part in ("ledger", "arrays", "mixture_of_depths") for each in line.get(part, ()))]:
            assert f"`{name}`" in section, name


def test_the_examples_are_valid() -> None:
    examples = re.findall(r"```yaml\n(monitor:.*?)```", GUIDE, re.DOTALL)
    parsed, traced, mapped, profiled = (
        MonitorSection.model_validate_json(json.dumps(yaml.safe_load(example)["monitor"])) for example in examples
    )
    assert traced.trace is not None
    assert mapped.compute_map is not None
    assert profiled.profile is not None
    assert [sink.kind for sink in parsed.sinks] == ["console", "jsonl", "tensorboard", "prometheus", "wandb", "mlflow"]
