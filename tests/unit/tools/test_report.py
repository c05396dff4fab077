"""Runs the command `report`. Tests what the command reads from a run or a trace, and that it refuses bad input before
it writes anything."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from moe_dist.config.load import resolved_yaml
from moe_dist.errors import ConfigError, DataError
from moe_dist.monitor.report.findings import tiles
from moe_dist.monitor.report.panels import PANELS
from moe_dist.monitor.report.routing import FRAMES
from moe_dist.monitor.trace.format import TOKEN, Manifest
from moe_dist.monitor.trace.writer import TraceWriter
from moe_dist.plan.policies import expert_groups
from moe_dist.runtime.status import AttemptRecord, write_status
from tests.support.invoked import invoke
from tests.support.messages import refused
from tests.support.tiny import tiny_config
from tools.report import main, open_routing


def write_trace(place: Path, manifest: Manifest, steps: range, tokens: int = 40) -> list[dict[str, list[list[int]]]]:
    """Writes a trace of random choices by one rank. Returns the arrays that the records of the traced steps must have."""
    place.mkdir(parents=True)
    (place / "manifest.json").write_text(manifest.to_json())
    writer, rng, arrays = TraceWriter(place, 0, weights=False), np.random.default_rng(0), []
    for step in steps:
        rows = np.zeros(tokens, TOKEN)
        rows["sequence"], rows["position"] = np.arange(tokens) // 8, np.arange(tokens) % 8
        rows["modality"] = rng.integers(0, 2, tokens)
        rows["token"] = rng.integers(0, 48, tokens) + 48 * rows["modality"]
        columns = np.array([[0, 1, 2, 5], [3, 4, 6, 7]])[rows["modality"]]  # true experts 0-4, null experts 5-7
        chosen = [[rng.permutation(row)[:2] for row in columns] for _ in manifest.layers]
        ids = np.array(chosen, np.int16).transpose(1, 0, 2)
        writer.add(step, rows, np.ascontiguousarray(ids), None)
        counts = [np.bincount(layer.ravel(), minlength=8).tolist() for layer in ids.transpose(1, 0, 2)]
        tokens_G = np.bincount(rows["modality"], minlength=2).tolist()
        none = [[0, 0] for _ in counts]
        arrays.append({"choices_LC": counts, "tokens_LG": [tokens_G for _ in counts], "dropped_LG": none})
    writer.close()
    return arrays


@pytest.fixture
def manifest(tiny_data: Path, tmp_path: Path) -> Manifest:
    config = tiny_config(tiny_data, tmp_path)
    return Manifest(
        attempt=1,
        from_step=0,
        ranks=1,
        layers=config.model.moe_layers,
        choices=2,
        weights=False,
        groups=expert_groups(config.model.moe),
        rank_of_expert=(0, 0, 0, 1, 1),
        modalities=("text", "image"),
        configuration=config.model_dump(mode="json"),
    )


@pytest.fixture
def run(tiny_data: Path, tmp_path: Path, manifest: Manifest) -> Path:
    """A run folder of five traced steps."""
    folder = tmp_path / "run"
    lines = write_trace(folder / "trace" / "a", manifest, range(1, 6))
    (folder / "config.yaml").write_text(resolved_yaml(tiny_config(tiny_data, tmp_path)))
    sent = {"rows_remote": 10, "rows_per_pair": 20, "payload_bytes": 1_000_000, "metadata_bytes": 10_000}
    other = {"kind": "step", "balance_coefficient": 0.02, "scalars": {}}
    records = [
        {"step": step, **other, "ledger": {name: step * each for name, each in sent.items()}, "arrays": arrays}
        for step, arrays in enumerate(lines, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in records))
    return folder


def test_a_run_and_its_trace_have_the_same_counts(run: Path) -> None:
    one, other = open_routing(run), open_routing(run / "trace")
    assert [frame.label for frame in one.frames] == ["1", "2", "3", "4", "5"]
    for a, b in zip([*one.frames, one.window], [*other.frames, other.window], strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a[:6], b[:6], strict=True))
    assert one.placement == other.placement
    assert (one.balance_coefficient, one.window_steps) == (0.02, 5)
    assert len(one.tokens.token_T) == 200
    assert np.array_equal(one.tokens.ids_TLK, other.tokens.ids_TLK)


def test_the_tiles_have_the_figures_of_all_choices(run: Path) -> None:
    routing = open_routing(run)
    ids = routing.tokens.ids_TLK
    experts, nulls = int(((ids >= 0) & (ids < 5)).sum()), int((ids >= 5).sum())
    shown = dict(reversed(tile) for tile in tiles(routing))
    assert shown["true experts a token and layer"] == f"{experts / ids[..., 0].size:.2f}"
    assert shown["of the choices are null"] == f"{nulls / ids.size:.0%}"
    assert shown["of the (token, expert) pairs are dropped"] == f"{(ids < 0).sum() / (ids.size - nulls):.1%}"


def test_a_long_trace_is_judged_by_its_last_steps(run: Path, manifest: Manifest) -> None:
    write_trace(run / "long" / "a", manifest, range(1, 201), tokens=8)
    found = open_routing(run / "long")
    assert (len(found.frames), found.frames[0].first, found.frames[-1].last) == (FRAMES, 1, 200)
    assert (found.window.first, found.window.last, found.window_steps) == (151, 200, 50)
    assert found.window.tokens_LG.sum(1).tolist() == [8 * 50] * len(found.layers)


def test_of_several_held_out_traces_the_latest_step_is_read(run: Path, manifest: Manifest) -> None:
    for step in (5, 3):  # the earlier step was traced later
        write_trace(run / "traces" / f"step_{step}" / "heldout", replace(manifest, split="held-out"), range(step, step + 1))
    tokens = open_routing(run).tokens
    assert (tokens.steps, tokens.split) == ((5,), "held-out")


def test_the_page_is_whole_and_loads_nothing(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    placed = tmp_path / "placed.yaml"
    placed.write_text("slots: [[text/0, text/1, text/2], [image/0, image/1]]")  # the run's placement
    done = invoke(
        main, run, "--against", run / "trace", "-o", out, "--ep", "3,5", "--node-sizes", "2", "--placement", placed
    )
    assert done.exit_code == 0, done.output
    text = out.read_text()
    first, *printed, _ = done.output.splitlines()
    assert f"<h2>{first}</h2>" in text
    assert len(printed) == len(re.findall("<li[ >]", text[: text.index("<nav")]))
    assert all(place.startswith(("data:", "#")) for place in re.findall(r'\b(?:src|href|srcset)="([^"]*)"', text))
    assert re.search(r"<script|url\(|@import|https?:", text) is None
    assert text.count("<section ") == len(PANELS)
    assert "The same tokens." in text
    assert "".join(f'<td class="e">{each}</td>' for each in ("30", "60", "3,000,000", "30,000")) in text, (
        "the mean of five steps"
    )
    assert re.findall(r'<td class="e">(\d+)</td><td>(pinned|interleaved|as in the run)', text) == [
        ("2", "as in the run"), ("2", "interleaved"), ("3", "pinned"), ("3", "interleaved"), ("4", "pinned"),
        ("4", "interleaved"), ("5", "pinned"),
    ]  # fmt: skip
    rows = dict(re.findall(r'<tr><td class="e">2</td><td>(as in the run|placed\.yaml)</td>(.*?)</tr>', text))
    assert rows["as in the run"] == rows["placed.yaml"]
    assert len(out.read_bytes()) < 5_000_000


TRACE, MANIFEST, RECORDS = "trace", "trace/a/manifest.json", "metrics.jsonl"


def groups_with(image: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda manifest: {"groups": [manifest["groups"][0], manifest["groups"][1] | image]}


def replicas_of(count: int, expert: int, rank: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Returns a change of the manifest: lists of replicas for `count` layers (0: for all layers). Only the first layer
    has a replica."""
    return lambda manifest: {"replicas": [[[expert, rank]], *[[]] * ((count or len(manifest["layers"])) - 1)]}


@pytest.mark.parametrize(
    ("file", "change", "opened", "error", "key"),
    [
        ("trace/a/rank_0.index", lambda _: b"", TRACE, DataError, "no step that all ranks wrote"),
        (MANIFEST, groups_with({"num_experts": 1, "num_null": 3}), ".", DataError, "groups and layers"),
        (MANIFEST, groups_with({"num_null": 1}), TRACE, DataError, "id 7 is outside the model"),
        (MANIFEST, lambda _: {"rank_of_expert": [0, 1]}, ".", DataError, "rank_of_expert"),
        (MANIFEST, replicas_of(0, 0, 0), ".", DataError, "replicas of layer 0"),
        (MANIFEST, replicas_of(1, 0, 1), ".", DataError, "replicas of 1 layers"),
        (MANIFEST, lambda _: {"modalities": ["text", "sound"]}, TRACE, DataError, "['sound']"),
        (MANIFEST, lambda _: {"modalities": ["text"]}, TRACE, DataError, "modality=1 is outside the 1 modalities"),
        (RECORDS, lambda _: b"", ".", DataError, "metrics.jsonl: no line has the arrays"),
        (RECORDS, lambda content: content.replace(b'"dropped_LG":[[0,0],[0,0]]', b'"dropped_LG":[[0],[0]]'), ".", DataError,
         "metrics.jsonl, step 1: arrays.dropped_LG"),
        (MANIFEST, lambda _: {"modalities": ["text"] * 257}, TRACE, DataError, "modalities"),
        (MANIFEST, groups_with({"modalities": ["text"] * 257}), TRACE, DataError, "257 modalities"),
        (MANIFEST, lambda manifest: {"groups": manifest["groups"] * 129}, TRACE, DataError, "groups"),
        ("config.yaml", None, "trace/a", ConfigError, "neither a run"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)  # fmt: skip
def test_bad_input_is_named(
    run: Path, file: str, change: Callable[[Any], Any] | None, opened: str, error: type[Exception], key: str
) -> None:
    path = run / file
    content = path.read_bytes()
    if change is None:
        path.unlink()
    elif file == MANIFEST:
        manifest = json.loads(content)
        path.write_text(json.dumps(manifest | change(manifest)))
    else:
        path.write_bytes(change(content))
    with refused(error, key, golden=False):
        open_routing(run / opened)


def test_a_tokenizer_that_takes_all_memory_is_refused(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tiny_data, tmp_path / "data")
    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(100)}, unk_token="w0"))
    made.decoder = decoders.Sequence([decoders.Replace("w", "ww")] * 32)
    made.save(str(data / "t.json"))
    values = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(values | {"tokenizer": "t.json"}))
    done = invoke(main, run, "--data", data, "-o", tmp_path / "report.html")
    assert (done.exit_code, "its tokenizer fails on a token" in done.stderr) == (65, True), done.output


def test_long_tokens_are_cut_and_a_ledger_may_lack_numbers(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A token of 100,000 digits is shown by its first 80. The page shows a token many times, and the regular expressions
    that find the kind of a token take quadratic time."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    Tokenizer(models.WordLevel({"1" * 100_000 + "x": 0}, unk_token="1")).save(str(data / "t.json"))
    values = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(values | {"tokenizer": "t.json"}))
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace("rows_remote", "rows"))
    done = invoke(main, run, "--data", data, "-o", tmp_path / "report.html")
    assert done.exit_code == 0, done.output
    assert max(map(len, re.findall("1+", (tmp_path / "report.html").read_text()))) == 80


def test_what_cannot_be_leaves_the_old_report(run: Path, tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")
    half = tmp_path / "half.yaml"
    half.write_text("slots: [[text/0]]")
    other = replace(manifest, groups=(replace(manifest.groups[0], top_k=1), manifest.groups[1]))
    write_trace(tmp_path / "other" / "a", other, range(1, 2))
    for options, message in (
        ((run, "--against", tmp_path / "other"), "2 MoE layers of text 3 + 1, top 1, width 16, image 2 + 2, top 2"),
        ((run, "--against", tmp_path / "nowhere"), f"--against {tmp_path / 'nowhere'}: no such folder; give a run"),
        ((run, "--ep", "2,x"), "--ep 2,x: 'x' is no whole number"),
        ((run, "--data", tmp_path), f"--data {tmp_path}: "),
        ((run, "--placement", tmp_path / "nowhere"), f"--placement {tmp_path / 'nowhere'}: cannot be read"),
        ((run, "--placement", run / "config.yaml"), "config.yaml: run: unknown key; the whole has the keys policy, slots"),
        ((run, "--placement", half), "placement.slots: no rank has text/1, text/2, image/0, image/1"),
    ):
        done = invoke(main, *options, "-o", out)
        assert (done.exit_code, message in done.stderr) == (78, True), done.output
    assert out.read_text() == "old"
    assert "must end with .html" in invoke(main, run, "-o", run / "config.yaml").stderr


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (b"choices_LC", b"choices", "the record of step 1"),
        (b'{"step":2', b'{"step":' + b"9" * 400, "line 2"),
        (b'{"step":2', b"\0" * 9, "line 2"),
        (b'"balance', b'"host":[0],"balance', "the record of step 1"),
        (b"1000000", b"9" * 400, "the record of step 1"),
        (b"0.02", b"9" * 400, "the record of step 1"),
    ],
    ids=range(6),
)
def test_damaged_lines_are_left_out_counted_and_named(run: Path, old: bytes, new: bytes, named: str) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    done = invoke(main, run, code=0)
    assert f"1 damaged records of metrics.jsonl are left out: {named}." in done.output
    assert sum(frame.last - frame.first + 1 for frame in open_routing(run).frames) >= 4


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (1, "The run failed, cause: killed: killed by SIGKILL, rank 1 on n1, after step 5; to do: look for who"),
        (None, "The run died without a recorded cause."),
        (75, "The run stopped: rank 1 on n1: killed by SIGKILL."),
    ],
)
def test_a_run_without_trace_and_checkpoint_is_drawn(
    run: Path, tiny_data: Path, tmp_path: Path, verdict: int | None, said: str
) -> None:
    for path in (run / "trace" / "a").iterdir():
        path.unlink()
    record = AttemptRecord("a", 0, "n1", 1, 0.0, 9.0, verdict, "rank 1 on n1: killed by SIGKILL", 1, 5)
    write_status(run / "status.json", record)
    done = invoke(main, run, code=0)
    assert said in done.output
    assert ("no checkpoint was saved, so the same command begins at step 1" in done.output) == (verdict == 1)
    assert open_routing(run).placement.num_ranks == tiny_config(tiny_data, tmp_path).parallel.ep
    page = (run / "report.html").read_text()
    head = re.sub("<[^>]+>", "", page[page.index('<ul class="heads">') : page.index("<h2>In words")])
    for subject in ("Loss", "Speed", "Data", "Memory"):
        assert f"? {subject} not judged: " in head.replace("&#10003;", "").replace("&#10007;", ""), head


def test_the_report_is_in_the_folder_of_its_subject_or_in_the_current_one(
    run: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_trace(tmp_path / "theirs" / "a", manifest, range(1, 3))

    def written(subject: Path) -> set[Path]:
        before = set(tmp_path.rglob("*.html"))
        done = invoke(main, subject, code=0)
        (made,) = set(tmp_path.rglob("*.html")) - before
        return {made, Path(done.stdout.splitlines()[-1].partition(": ")[0])}

    for subject in (run, run / "trace", tmp_path / "theirs"):
        assert written(subject) == {subject / "report.html"}
        (subject / "report.html").unlink()
    monkeypatch.setattr("tools.report.os.access", lambda path, mode, **_: Path(path) != run or not mode & os.W_OK)
    assert written(run) == {tmp_path / "here" / "report.html", Path("report.html")}
