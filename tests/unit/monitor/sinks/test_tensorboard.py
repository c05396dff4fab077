"""The tests read the events with TensorBoard's own reader."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_dist.monitor.metrics import Record, evaluation_scalars
from moe_dist.monitor.pictures import Subject
from moe_dist.monitor.sinks.sink import SinkContext
from moe_dist.monitor.sinks.tensorboard import TensorBoardSink
from moe_dist.monitor.statistics import ComputeMap, EvaluationResult
from moe_dist.monitor.tags import FIRST, FIRST_TAGS, curve_of
from tests.unit.monitor.conftest import MakeRecord

MAP = ComputeMap({"text": 1.5}, 2)


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """The sink writes its event files to this folder."""
    return tmp_path / "tensorboard"


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0, "histograms": 0})
    return accumulator.Reload()


def pages(accumulator: EventAccumulator) -> list[str]:
    events = sorted(accumulator.Tensors("configuration/text_summary"), key=lambda event: event.step)
    return [event.tensor_proto.string_val[0].decode() for event in events]


def curves(folder: Path) -> dict[tuple[str, str], EventAccumulator]:
    """Maps (sub-run, tag) of every scalar to the sub-run's events."""
    runs = {"": read(folder)} | {path.name: read(path) for path in folder.iterdir() if path.is_dir()}
    return {(name, tag): events for name, events in runs.items() for tag in events.Tags()["scalars"]}


def points(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    """Returns the points of all files, sorted by step, because files that began in the same second are read in the order of
    their names."""
    return sorted((event.step, event.value) for event in accumulator.Scalars(tag))


def write(
    folder: Path,
    subject: Subject,
    records: list[Record],
    *,
    resume_step: int = 0,
    pictures_every: int = 4,
    mean_over: int = 1,
) -> None:
    sink = TensorBoardSink(
        SinkContext(folder.parent, subject=subject, modalities=("text", "image"), resume_step=resume_step),
        pictures_every=pictures_every,
        mean_over=mean_over,
    )
    sink.text("configuration", f"resumed at {resume_step}")
    for record in records:
        sink.step(record)
    sink.close()
    sink.close()


def test_scalars_come_back(tmp_path: Path, subject: Subject, make_record: MakeRecord) -> None:
    records = [make_record(step) for step in (1, 2, 3)]
    write(tmp_path, subject, records)
    found = curves(tmp_path)
    for tag, value in records[0].scalars.items():
        sub_run, shown = curve_of(tag)
        if value is None:
            assert (sub_run, shown) not in found
        else:
            events = found[sub_run, shown].Scalars(shown)
            assert [event.step for event in events] == [1, 2, 3]
            assert events[0].value == pytest.approx(value, rel=1e-6)
    assert len(found) == sum(value is not None for value in records[0].scalars.values())


def test_a_point_of_a_routing_curve_is_the_mean_of_some_steps(
    tmp_path: Path, subject: Subject, make_record: MakeRecord
) -> None:
    tag = "moe/router_entropy"
    values = {step: None if step == 2 else float(step) for step in range(1, 8)}
    records = [replace(each, scalars={**each.scalars, tag: values[each.step]}) for each in map(make_record, values)]
    write(tmp_path, subject, records, mean_over=3)
    found = read(tmp_path)
    assert points(found, tag) == [(3, 2.0), (6, 5.0), (7, 7.0)]
    assert [step for step, _ in points(found, "0_first/loss/total")] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in points(found, "perf/step_seconds")] == [3, 6, 7]
    write(tmp_path, subject, records[4:], resume_step=4, mean_over=3)
    assert points(read(tmp_path), tag) == [(3, 2.0), (6, 5.5), (7, 7.0)]


def test_every_tag_has_its_description(tmp_path: Path, subject: Subject, make_record: MakeRecord) -> None:
    sink = TensorBoardSink(SinkContext(tmp_path.parent, subject=subject, modalities=("text",)))
    for step in (1, 2):
        sink.step(make_record(step, active_target={"text": 1.5}, dropped_LE=np.full((3, 8), 1)))
    result = EvaluationResult(2, {"text": 3.0}, {"text": 4}, {}, 0.5, 0.6, compute_map=MAP)
    sink.evaluation(result, evaluation_scalars(result, ("text",), 2))
    sink.close()
    assert {"moe/compute_map", "moe/dropped_fraction", "moe/load_over_target"} <= set(read(tmp_path).Tags()["images"])
    for folder in (tmp_path, tmp_path / "text", tmp_path / "image"):
        accumulator = read(folder)
        tags = accumulator.Tags()
        for tag in (*tags["scalars"], *tags["images"], *tags["histograms"]):
            metadata = accumulator.SummaryMetadata(tag)
            text = metadata.summary_description
            assert metadata.plugin_data.plugin_name, "without it TensorBoard's fast server drops the description"
            assert metadata.data_class
            assert text.endswith("."), tag
            assert not tag.startswith("moe/dropped") or "capacity dropped" in text


def test_the_first_page_has_the_four_curves_that_matter(tmp_path: Path, subject: Subject, make_record: MakeRecord) -> None:
    write(tmp_path, subject, [make_record(1, dropped_LE=np.full((3, 8), 1))])
    first = list(dict.fromkeys(tag for _, tag in sorted(curves(tmp_path), key=lambda each: each[1])))[:4]
    assert first == [f"{FIRST}{tag}" for tag in sorted(FIRST_TAGS)]
    assert 0 < read(tmp_path).Scalars(f"{FIRST}moe/dropped_share")[0].value < 1


def test_after_a_resume_each_step_is_there_once(tmp_path: Path, subject: Subject, make_record: MakeRecord) -> None:
    write(tmp_path, subject, [make_record(step, lr=1.0) for step in range(1, 11)])
    write(tmp_path, subject, [make_record(step, lr=2.0) for step in range(7, 13)], resume_step=6)
    accumulator = read(tmp_path)
    assert points(accumulator, "optim/lr") == [(s, 1.0) for s in range(1, 7)] + [(s, 2.0) for s in range(7, 13)]
    # The first attempt's pictures at steps 8 and 10 are gone.
    assert sorted(event.step for event in accumulator.Images("moe/load/text")) == [4, 8, 12]
    assert pages(accumulator) == ["resumed at 0", "resumed at 6"]


def test_an_evaluation_that_is_owed_is_there_once(tmp_path: Path, subject: Subject, make_record: MakeRecord) -> None:
    """The first attempt stops after step 2. The second and the third attempt each evaluate, and die before they save."""
    write(tmp_path, subject, [make_record(1), make_record(2)])
    for attempt in (1, 2):
        context = SinkContext(tmp_path.parent, subject=subject, modalities=("text",), resume_step=2, evaluation_owed=True)
        sink = TensorBoardSink(context)
        result = EvaluationResult(2, {"text": 3.0 + attempt}, {"text": 4}, {}, 0.5, None, compute_map=MAP)
        sink.evaluation(result, evaluation_scalars(result, ("text",), 2))
        sink.close()
    accumulator = read(tmp_path)
    assert points(read(tmp_path / "text"), "eval/modality") == [(2, 5.0)]
    assert points(accumulator, "perf/balance_efficiency") == [(2, 0.5)]
    assert [event.step for event in accumulator.Images("moe/compute_map")] == [2]
    assert [step for step, _ in points(accumulator, "0_first/loss/total")] == [1, 2], "the steps themselves stay"


def test_resuming_from_an_older_checkpoint_cuts_several_attempts(
    tmp_path: Path, subject: Subject, make_record: MakeRecord
) -> None:
    """The last attempt was killed in the middle of a write."""
    write(tmp_path, subject, [make_record(step, lr=1.0) for step in range(1, 5)])
    write(tmp_path, subject, [make_record(step, lr=2.0) for step in range(5, 9)], resume_step=4)
    write(tmp_path, subject, [make_record(step, lr=3.0) for step in range(9, 12)], resume_step=8)
    newest = sorted(tmp_path.glob("events*"), key=lambda path: int(path.name.rsplit(".", 1)[1]))[-1]
    newest.write_bytes(newest.read_bytes()[:-5])
    (tmp_path / "events.out.tfevents.planted").touch()
    write(tmp_path, subject, [make_record(7, lr=4.0)], resume_step=6)
    expected = [(step, 1.0) for step in range(1, 5)] + [(5, 2.0), (6, 2.0), (7, 4.0)]
    assert points(read(tmp_path), "optim/lr") == expected
    write(tmp_path, subject, [make_record(3, lr=5.0)], resume_step=2)
    assert points(read(tmp_path), "optim/lr") == [(1, 1.0), (2, 1.0), (3, 5.0)]
    assert not (tmp_path / "kept").exists()


def test_pictures_and_histograms(tmp_path: Path, subject: Subject, make_record: MakeRecord) -> None:
    records = [make_record(step) for step in range(1, 7)]
    write(tmp_path, subject, records)
    accumulator = read(tmp_path)
    tags = {"moe/load/text", "moe/load/image", "moe/rank_load", "moe/null_fraction", "moe/relative_entropy"}
    assert set(accumulator.Tags()["images"]) == tags
    assert not tags & set(accumulator.Tags()["scalars"]), "TensorBoard shows one kind under a tag"
    for tag in tags:
        events = accumulator.Images(tag)
        assert [event.step for event in events] == [4, 6], "the last two steps are drawn at the end"
        picture = Image.open(io.BytesIO(events[0].encoded_image_string))
        assert picture.size == (events[0].width, events[0].height)
        assert np.asarray(picture).std() > 10
    histogram = accumulator.Histograms("moe/load_histogram/text")[0].histogram_value
    loads = sum(record.arrays["choices_LC"][:, :4] for record in records[:4])
    assert histogram.num == loads.size
    assert histogram.max == pytest.approx((loads / loads.mean(1, keepdims=True)).max())
