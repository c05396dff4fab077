import json
import math
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_dist.monitor.sinks.prometheus import PrometheusSink, exposition, metric_name
from moe_dist.monitor.sinks.sink import SinkContext
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.monitor.tags import DEPTH_MEANING, MEANING, meaning, split_tag
from tests.unit.monitor.conftest import MakeRecord

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_scalar_is_a_sample(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "node" / "metrics.prom"
    record = make_record(3)
    PrometheusSink(SinkContext(Path(), run_name="demo"), path=str(path)).step(record)
    samples = parse(path.read_text())
    assert samples[("moe_dist_step", (("run", "demo"),))] == 3
    assert samples[("moe_dist_loss", (("run", "demo"), ("term", "total")))] == record.scalars["loss/total"]
    text = (("group", "text"), ("run", "demo"))
    assert samples[("moe_dist_moe_null_fraction", text)] == record.scalars["moe/null_fraction/text"]
    assert samples[("moe_dist_data_epochs", (("modality", "image"), ("run", "demo")))] == pytest.approx(0.3)
    known = [tag for tag, value in record.scalars.items() if value is not None]
    assert len(samples) == len(known) + 1


def test_families_have_help_and_are_gauges(make_record: MakeRecord) -> None:
    families = list(text_string_to_metric_families(exposition(make_record(1).scalars, step=1, run_name="r")))
    assert len({family.name for family in families}) == len(families), "each family stands once"
    assert {family.type for family in families} == {"gauge"}
    by_name = {family.name: family.documentation for family in families}
    assert by_name["moe_dist_moe_load_imbalance"] == meaning("moe/load_imbalance/text")


def test_names_of_gauges_pass_promtools_rules() -> None:
    """Applies the naming rules of `promtool check metrics` to every tag that a run can have."""
    families = [split_tag(tag.replace("{", "").replace("}", ""))[0] for tag in MEANING | DEPTH_MEANING]
    names = {metric_name(family) for family in families} | {"moe_dist_step"}
    assert len(names) == len(set(families)) + 1, "two families share a name"
    abbreviations = "s|ms|us|ns|sec|b|kb|mb|gb|tb|pb|m|h|d"
    units = "(milli|micro|nano|kilo|mega|giga)(seconds|bytes|meters|grams|watts)|bits|minutes|hours|days|weeks|celsius"
    for name in names:
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name), "lower case with underscores, and no colon"
        assert not name.endswith(("_total", "_count", "_sum", "_bucket")), f"{name}: of counters and histograms"
        assert not re.search(r"(^|_)(gauge|counter|histogram|summary|untyped)(_|$)", name), f"{name} names its type"
        assert not re.search(rf"_({abbreviations})$", name), f"{name}: a unit must be written out"
        assert not re.search(rf"(^|_)({units})(_|$)", name), f"{name}: not a base unit"


def test_odd_numbers_and_odd_names() -> None:
    scalars = {"loss/total": math.nan, "optim/grad_norm": math.inf, "optim/lr": -math.inf, "perf/mfu": None}
    name = 'a"b\\c\nd'
    samples = parse(exposition(scalars, step=0, run_name=name))
    assert math.isnan(samples[("moe_dist_loss", (("run", name), ("term", "total")))])
    assert samples[("moe_dist_optim_grad_norm", (("run", name),))] == math.inf
    assert samples[("moe_dist_optim_lr", (("run", name),))] == -math.inf
    assert not any(key[0] == "moe_dist_perf_mfu" for key in samples)


def test_evaluations_stay_until_the_next(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "metrics.prom"
    sink = PrometheusSink(SinkContext(Path(), run_name="r"), path=str(path))
    sink.step(make_record(1))
    sink.evaluation(EvaluationResult(1, {"text": 3.0}, {"text": 4}), {"eval/text": 3.0})
    assert ("moe_dist_optim_lr", (("run", "r"),)) in parse(path.read_text()), "the step's numbers stay beside it"
    sink.step(make_record(2))
    samples = parse(path.read_text())
    assert samples[("moe_dist_eval", (("part", "text"), ("run", "r")))] == 3.0
    assert samples[("moe_dist_step", (("run", "r"),))] == 2


def test_every_query_of_the_dashboard_names_a_metric_and_labels_that_exist() -> None:
    dashboard = json.loads((Path(__file__).parents[4] / "docs" / "examples" / "grafana.json").read_text())
    labels: dict[str, set[str]] = {"moe_dist_step": {"run"}}
    for tag in MEANING:
        family, label, _ = split_tag(tag.replace("{", "").replace("}", ""))
        labels[metric_name(family)] = {"run"} | ({label} if label else set())
    shown = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            (name,) = re.findall(r"moe_dist_\w+", target["expr"])
            assert target["expr"] == f'{name}{{run=~"$run"}}'
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == labels[name], "each curve has a name of its own"
            shown.add(name)
    (runs,) = (v["query"]["query"] for v in dashboard["templating"]["list"] if v["name"] == "run")
    assert runs == "label_values(moe_dist_step, run)"
    left_out = {"moe_dist_step", "moe_dist_optim_lr", "moe_dist_optim_tokens", "moe_dist_data_epochs"}
    assert shown == set(labels) - left_out - {"moe_dist_comm_dedup_factor"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
