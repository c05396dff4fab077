"""Reads traces of other systems: Megatron-Core's and FLAME-MoE's documented formats, and arrays of vLLM and SGLang."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from moe_dist.errors import ConfigError, DataError
from moe_dist.monitor.trace import foreign
from moe_dist.monitor.trace.foreign import read_foreign
from tests.support.messages import refused

IDS = np.random.default_rng(0).random((12, 3, 8)).argsort(axis=2)[:, :, :2]  # 12 tokens, 3 layers, k = 2 different experts


def megatron(folder: Path, ids: np.ndarray = IDS, layers: tuple[int, ...] = (1, 2, 4)) -> Path:
    """Writes a trace of two ranks and two steps. Each step has two micro-batches of six tokens, and a block for multi-token
    prediction."""
    folder.mkdir(exist_ok=True)
    for rank in (0, 1):
        lines = []
        for step in (10, 11):
            for part in (ids[:6], ids[6:]):
                for place, layer in enumerate(layers):
                    about = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
                    top = part[:, place].tolist()
                    lines.append({**about, "num_tokens": len(top), "topk": 2, "top_indices": top})
            lines.append({**lines[-1], "block": "mtp", "mtp_idx": 0})
        (folder / f"router_trace_rank{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_megatron_router_trace(tmp_path: Path) -> None:
    trace = read_foreign(megatron(tmp_path / "trace"), 8)
    assert trace.steps == (10, 11)
    step = trace.step(11)
    assert np.array_equal(step.ids, np.concatenate([IDS, IDS]))
    assert step.manifest.layers == (1, 2, 4)
    expected = [2 * np.bincount(IDS[:, layer].ravel(), minlength=8) for layer in range(3)]
    assert np.array_equal(step.choices(), expected)


def test_routed_experts_of_vllm_and_sglang(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IDS[:5].astype(np.int16))  # vLLM returns this array
    answer = base64.b64encode(IDS[5:].astype(np.int32).tobytes())  # SGLang returns this text
    np.save(tmp_path / "b.npy", np.frombuffer(base64.b64decode(answer), np.int32).reshape(-1, 3, 2))
    step = read_foreign(tmp_path, 8).step(1)
    assert np.array_equal(step.ids, IDS)
    assert step.tokens["sequence"].tolist() == [0] * 5 + [1] * 7
    assert np.array_equal(read_foreign(tmp_path / "b.npy", 8).step(1).ids, IDS[5:])


def test_layers_without_experts_are_left_out(tmp_path: Path) -> None:
    """vLLM and SGLang return all layers of the model, with zeros for dense layers."""
    dense = np.zeros((len(IDS), 1, 2), IDS.dtype)
    np.save(tmp_path / "a.npy", np.concatenate([dense, IDS], axis=1))
    step = read_foreign(tmp_path, 8).step(1)
    assert step.manifest.layers == (1, 2, 3)
    assert np.array_equal(step.ids, IDS)
    np.save(tmp_path / "a.npy", np.zeros_like(IDS))
    with refused(DataError, "all ids are 0"):
        read_foreign(tmp_path, 8)


def test_a_token_with_an_expert_twice_is_named(tmp_path: Path) -> None:
    ids = IDS.copy()
    ids[4, 1] = 5
    np.save(tmp_path / "a.npy", ids)
    with refused(DataError, "token 4 has an expert twice in layer 1"):
        read_foreign(tmp_path, 8)


def flame(folder: Path, columns: Mapping[str, object], name: str = "iter_0540/layer_02") -> Path:
    """Writes a file as the README of FLAME-MoE-Traces describes it."""
    path = folder / "actives" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(dict(columns)), path)
    return path


def test_flame_moe_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (540, 1080):
        for place, layer in enumerate((2, 3, 10)):
            indices = pyarrow.array(IDS[:, place].tolist(), pyarrow.list_(pyarrow.int16()))
            scores = pyarrow.array([[0.5, 0.25]] * len(IDS), pyarrow.list_(pyarrow.float32()))
            flame(tmp_path, {"scores": scores, "indices": indices}, f"iter_{step:04}/layer_{layer:02}")
    trace = read_foreign(tmp_path, 8)
    assert (trace.steps, trace.step(540).manifest.layers) == ((540, 1080), (2, 3, 10))
    assert np.array_equal(trace.step(1080).ids, IDS)
    file = tmp_path / "actives/iter_1080/layer_03.parquet"
    assert np.array_equal(read_foreign(file, 8).step(1080).ids, IDS[:, 1:2])
    monkeypatch.setattr("moe_dist.monitor.trace.foreign.FLAME_TOKENS", 5)
    assert np.array_equal(read_foreign(tmp_path, 8).step(540).ids, IDS[:5])
    flame(tmp_path, {"indices": IDS[:4, 0].tolist()}, "iter_1080/layer_03")
    with refused(DataError, "actives, step 1080: (tokens, choices)={2: (5, 2), 3: (4, 2), 10: (5, 2)}"):
        read_foreign(tmp_path, 8)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"experts": [[1, 2]]}, "iter_0540/layer_02"),
        ({"indices": [[1, 2], [3]]}, "iter_0540/layer_02"),
        ({"indices": [[0.5, 2.0]]}, "iter_0540/layer_02"),
        ({"indices": [1, 2]}, "iter_0540/layer_02"),
        ({"indices": []}, "iter_0540/layer_02"),
        ({"indices": [[0] * (1 << 24)]}, "iter_0540/layer_02"),  # a file of 1 KB that unpacks to 128 MiB
        ({"indices": [[1, 2]]}, "iter_0540/layer_02b"),
        (None, "iter_0540/layer_02"),
    ],
    ids=["column", "ragged", "float", "flat", "empty", "bomb", "name", "cut"],
)
@pytest.mark.slow
def test_bad_files_of_flame_moe_are_named(tmp_path: Path, columns: Mapping[str, object] | None, name: str) -> None:
    path = flame(tmp_path, columns or {"indices": [[1, 2]]}, name)
    if columns is None:
        path.write_bytes(path.read_bytes()[:-9])
    with refused(DataError, "restore the file", golden=False):
        read_foreign(tmp_path, 8)


def test_bad_files_are_named(tmp_path: Path) -> None:
    folder = megatron(tmp_path / "trace")
    with refused(DataError, "--experts 7"):
        read_foreign(folder, 7)
    file = folder / "router_trace_rank1.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-20])
    with refused(DataError, "router_trace_rank1.jsonl, line 14"):
        read_foreign(folder, 8)
    file.write_text("".join(line + "\n" for line in whole.splitlines()[1:]))
    with refused(DataError, "step 10: (tokens, choices)={1: (6, 2), 2: (12, 2), 4: (12, 2)}"):
        read_foreign(folder, 8)
    megatron(folder, layers=(1, 2))
    file.write_text(whole)
    with refused(DataError, "give the files of one model"):
        read_foreign(folder, 8)
    with refused(ConfigError, "router_trace_rank*.jsonl or *.npy or actives/iter_*/layer_*.parquet"):
        read_foreign(tmp_path, 8)


@pytest.mark.parametrize("content", [IDS[0], IDS * 0.5, None, np.zeros((0, 0, 0))], ids=["2-d", "float", "cut", "empty"])
def test_bad_arrays_are_named(tmp_path: Path, content: np.ndarray | None) -> None:
    path = tmp_path / "a.npy"
    np.save(path, IDS if content is None else content)
    path.write_bytes(path.read_bytes()[: -9 if content is None else None])
    with refused(DataError, "a.npy", golden=content is not None):
        read_foreign(path, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"top_indices": [[10**30, 1]]},
        {"step": "10"},
        {"step": 1 << 53},
        {"text": "x" * 5000},
        {"layer": 1.5},
        {"num_tokens": -1},
        {"topk": 1, "num_tokens": 12},
    ],
)
def test_bad_lines_of_megatron_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Mapping[str, object]
) -> None:
    monkeypatch.setattr(foreign, "_MOST_LINE", 5000)
    file = megatron(tmp_path / "trace") / "router_trace_rank0.jsonl"
    first, second, *rest = file.read_text().splitlines()
    file.write_text("\n".join([first, json.dumps(json.loads(second) | change), *rest]))
    with pytest.raises(DataError, match="line 2: not a record"):
        read_foreign(tmp_path / "trace", 8)
