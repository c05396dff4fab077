"""On CUDA, Triton's kernels are chosen where possible. Otherwise torch's operations are chosen, and the log gives the
reason."""

import logging
from pathlib import Path

import pytest
import torch

from moe_dist.errors import ConfigError
from moe_dist.moe import kernel_choice
from moe_dist.moe.kernel_choice import choose_kernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.kernels.triton_kernels import TRITON
from moe_dist.train.build.training import row_kernels
from tests.support.messages import refused
from tests.support.tiny import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(kernel_choice, "why_not", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_triton_on_cuda_alone(dtype: torch.dtype) -> None:
    assert choose_kernels("auto", device=CUDA, dtype=dtype) == (TRITON, None)
    assert choose_kernels("auto", device=CPU, dtype=dtype) == (TORCH, None)
    assert choose_kernels("torch", device=CUDA, dtype=dtype) == (TORCH, None)
    assert choose_kernels("triton", device=CUDA, dtype=dtype) == (TRITON, None)


def test_auto_does_not_take_kernels_that_fail_their_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "why_not", lambda kernels, device, dtype: f"wrong on {device}")
    assert choose_kernels("auto", device=CUDA, dtype=torch.bfloat16) == (TORCH, "wrong on cuda:0")
    assert choose_kernels("triton", device=CUDA, dtype=torch.bfloat16) == (TRITON, None), "asked for by name"


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else object())


def old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))


@pytest.mark.parametrize(("lack", "reason"), [(without_triton, "not installed"), (old_card, "this GPU has 7.5")])
def test_a_fallback_has_a_reason_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lack, reason: str
) -> None:
    lack(monkeypatch)
    for kind in ("auto", "triton"):
        config = tiny_config(tmp_path, tmp_path, {"parallel.kernels.kind": kind})
        allowed = tiny_config(tmp_path, tmp_path, {"parallel.kernels.kind": kind, "parallel.kernels.fallback": True})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert row_kernels(allowed, CUDA) is TORCH
        (record,) = caplog.records
        assert reason in record.getMessage()
        with refused(ConfigError, reason):
            row_kernels(config, CUDA)
    assert row_kernels(tiny_config(tmp_path, tmp_path), CPU) is TORCH


def test_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, dtype, words in (
        (CPU, torch.float32, "need CUDA, and this rank computes on cpu"),
        (CUDA, torch.float64, "not enough for a float64 model"),
    ):
        kernels, reason = choose_kernels("triton", device=device, dtype=dtype)
        assert kernels is TORCH
        assert words in str(reason)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_kernels("triton", device=CPU, dtype=torch.float32) == (TRITON, None)
