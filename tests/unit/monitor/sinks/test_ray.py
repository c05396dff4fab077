import json
import socket
from pathlib import Path

from moe_dist.monitor.sinks.prometheus import RaySink
from moe_dist.monitor.statistics import EvaluationResult
from tests.unit.monitor.conftest import MakeRecord


def test_a_step_is_one_datagram_of_samples_and_an_evaluation_another(tmp_path: Path, make_record: MakeRecord) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader:
        reader.bind(str(tmp_path / "s"))
        sink = RaySink(socket_path=str(tmp_path / "s"), run_name="demo")
        record = make_record(3)
        sink.step(record)
        sink.evaluation(EvaluationResult(3, {"text": 3.0}, {"text": 4}), {"eval/text": 3.0})
        step, evaluation = (json.loads(reader.recv(1 << 18)) for _ in range(2))
        sink.close()
    assert ["moe_dist_step", "Steps taken.", {"run": "demo"}, 3] in step
    losses = {labels["term"]: value for name, _, labels, value in step if name == "moe_dist_loss"}
    assert losses["total"] == record.scalars["loss/total"]
    assert len(step) == 1 + sum(value is not None for value in record.scalars.values())
    assert ["moe_dist_eval", {"run": "demo", "part": "text"}, 3.0] in [[name, *rest] for name, _, *rest in evaluation]


def test_nobody_listening_and_nobody_reading_cost_nothing(tmp_path: Path, make_record: MakeRecord) -> None:
    sink = RaySink(socket_path=str(tmp_path / "s"), run_name="demo")
    sink.step(make_record(1))  # no process listens
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader:
        reader.bind(str(tmp_path / "s"))
        for step in range(2, 100):  # more datagrams than the socket's buffer holds
            sink.step(make_record(step))
        assert json.loads(reader.recv(1 << 18))[0][3] == 2
