"""docs/monitoring.md explains every tag, picture and field of the code, and its examples are valid."""

import json
import re
from pathlib import Path

import pytest
import yaml

from moe_dist.config.schema import MonitorSection
from moe_dist.monitor.tags import DEPTH_MEANING, MEANING

GUIDE = (Path(__file__).parents[3] / "docs" / "monitoring.md").read_text()


@pytest.mark.parametrize("family", [*MEANING, *DEPTH_MEANING, "mixture_of_depths/layers"])
def test_every_tag_is_explained(family: str) -> None:
    stem = family.split("/{")[0] + ("/<" if "{" in family else "")
    assert f"`{stem}" in GUIDE


def test_the_examples_are_valid() -> None:
    examples = re.findall(r"```yaml\n(monitor:.*?)```", GUIDE, re.DOTALL)
    parsed, traced, mapped, profiled = (
        MonitorSection.model_validate_json(json.dumps(yaml.safe_load(example)["monitor"])) for example in examples
    )
    assert traced.trace is not None
    assert mapped.compute_map is not None
    assert profiled.profile is not None
    assert [sink.kind for sink in parsed.sinks] == ["console", "jsonl", "tensorboard", "prometheus", "wandb", "mlflow"]
