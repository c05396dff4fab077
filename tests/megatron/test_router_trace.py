"""Reads a trace that Megatron-Core wrote. No megatron-core for Python 3.11 writes traces, so only `make test-megatron`
runs this test."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router_trace import RouterTracer  # pyright: ignore[reportMissingImports]

from moe_dist.monitor.trace.foreign import read_foreign

pytestmark = pytest.mark.megatron
IDS = np.random.default_rng(0).random((12, 3, 8)).argsort(axis=2)[:, :, :2]  # [tokens, layers, k different experts]


def test_a_trace_that_megatron_wrote(tmp_path: Path) -> None:
    tracer = RouterTracer(str(tmp_path), max_steps=9, rank=0, training_mode=True)
    for step in (10, 11):
        tracer.record_indices(torch.tensor(IDS), layer_ids=[1, 2, 4])
        tracer.record_indices(torch.tensor(IDS), block="mtp", mtp_idx=0)
        tracer.advance_step(step)
    tracer.flush()
    trace = read_foreign(tmp_path, 8)
    assert (trace.steps, trace.step(11).manifest.layers) == ((10, 11), (1, 2, 4))
    assert np.array_equal(trace.step(11).ids, IDS)
