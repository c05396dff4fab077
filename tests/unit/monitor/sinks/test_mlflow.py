"""Tests the MLflow sink with a stand-in for MLflow's client, and with a server that does not exist."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest

from moe_dist.errors import ConfigError
from moe_dist.monitor.metrics import Record
from moe_dist.monitor.sinks.sink import SinkContext
from moe_dist.monitor.sinks.trackers import MlflowSink
from tests.support.messages import refused
from tests.unit.monitor.conftest import send


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Accepts only arguments that MLflow's own client accepts."""
    import mlflow  # 1 s, which each worker would need to collect this file

    client = create_autospec(mlflow.MlflowClient, instance=True)
    client.get_experiment_by_name.return_value = None
    client.create_experiment.return_value = "7"
    client.create_run.return_value.info.run_id = "r1"
    monkeypatch.setattr(mlflow, "MlflowClient", lambda: client)
    monkeypatch.setattr(mlflow, "flush_async_logging", lambda: None)
    return client


def test_every_value_arrives_with_its_step(client: Any, make_record: Callable[..., Record]) -> None:
    send(MlflowSink(SinkContext(Path(), run_name="demo", resume_step=4), experiment="moe", uri="http://x"), make_record)
    client.create_run.assert_called_once_with("7", run_name="demo from step 4", tags={"moe_dist.run": "demo"})
    sent = [metric for call in client.log_batch.call_args_list for metric in call.kwargs["metrics"]]
    expected = {(tag, step, v) for step in (5, 6) for tag, v in make_record(step).scalars.items() if v is not None}
    assert {(metric.key, metric.step, metric.value) for metric in sent} == expected | {("eval/text", 6, 3.0)}
    client.set_terminated.assert_called_once_with("r1")


def test_without_the_package_the_message_has_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with refused(ConfigError):
        MlflowSink(SinkContext(Path(), run_name="demo"), experiment="moe", uri="http://x")


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"kind mlflow, server http://127\.0\.0\.1:9: .*take the sink out"):
        MlflowSink(SinkContext(Path(), run_name="demo"), experiment="moe", uri="http://127.0.0.1:9")
