"""MLflow's real client, and a server that answers the used requests of MLflow's REST interface."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import ConfigError
from moe_dist.monitor.metrics import Record
from moe_dist.monitor.sinks.mlflow import MlflowSink
from moe_dist.monitor.sinks.sink import SinkContext
from tests.support.messages import refused
from tests.unit.monitor.conftest import send

INFO = {"run_id": "r1", "run_uuid": "r1", "experiment_id": "7", "status": "RUNNING", "artifact_uri": "x"}
Requests = list[tuple[str, dict[str, Any]]]


class Answers(BaseHTTPRequestHandler):
    seen: Requests

    def do_GET(self) -> None:
        if "/runs/get" in self.path:
            return self._answer(200, {"run": {"info": INFO, "data": {}}})
        self._answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"})

    def do_POST(self) -> None:
        call = self.path.split("/mlflow/")[1]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((call, body))
        answers = {
            "experiments/create": {"experiment_id": "7"},
            "runs/create": {"run": {"info": INFO, "data": {}}},
            "runs/update": {"run_info": INFO},
        }
        self._answer(200, answers.get(call, {}))

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Requests]]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    handler = type("Handler", (Answers,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listener.server_address[1]}", handler.seen
        listener.shutdown()
        thread.join()


def test_every_value_arrives_with_its_step(server: tuple[str, Requests], make_record: Callable[..., Record]) -> None:
    uri, seen = server
    send(MlflowSink(SinkContext(Path(), run_name="demo", resume_step=4), experiment="moe", uri=uri), make_record)
    (run,) = (body for call, body in seen if call == "runs/create")
    assert (run["experiment_id"], run["run_name"]) == ("7", "demo from step 4")
    assert {"key": "moe_dist.run", "value": "demo"} in run["tags"]
    sent = [metric for call, body in seen if call == "runs/log-batch" for metric in body["metrics"]]
    expected = {(tag, step, v) for step in (5, 6) for tag, v in make_record(step).scalars.items() if v is not None}
    assert {(metric["key"], metric["step"], metric["value"]) for metric in sent} == expected | {("eval/text", 6, 3.0)}
    assert [body["status"] for call, body in seen if call == "runs/update"] == ["FINISHED"]


def test_without_the_package_the_message_has_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with refused(ConfigError):
        MlflowSink(SinkContext(Path(), run_name="demo"), experiment="moe", uri="http://x")


def test_a_server_that_does_not_answer_is_named(server: tuple[str, Requests]) -> None:
    with pytest.raises(ConfigError, match=r"kind mlflow, server http://127\.0\.0\.1:9: .*take the sink out"):
        MlflowSink(SinkContext(Path(), run_name="demo"), experiment="moe", uri="http://127.0.0.1:9")
