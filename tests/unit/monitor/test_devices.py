"""Tests device readings with a fake NVML, with an NVML that fails, and without NVML."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from moe_dist.monitor.devices import DeviceMonitor
from moe_dist.train.step.training_step import largest_memory


class FakeNvml:
    """Stands in for the module pynvml. `power` may be an exception."""

    def __init__(self, power: int | Exception = 250_000) -> None:
        self.power = power
        self.utilisation = 73
        self.asked: list[object] = []
        self.threads: set[str] = set()
        self.shut = 0

    def module(self) -> Any:
        return SimpleNamespace(
            nvmlInit=lambda: None,
            nvmlShutdown=self._shutdown,
            nvmlDeviceGetHandleByIndex=lambda index: self.asked.append(index) or "handle",
            nvmlDeviceGetHandleByUUID=lambda uuid: self.asked.append(uuid) or "handle",
            nvmlDeviceGetUtilizationRates=self._utilisation,
            nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3 * 2**30),
            nvmlDeviceGetPowerUsage=self._power,
        )

    def _shutdown(self) -> None:
        self.shut += 1

    def _utilisation(self, handle: str) -> SimpleNamespace:
        assert handle == "handle"
        self.threads.add(threading.current_thread().name)
        return SimpleNamespace(gpu=self.utilisation)

    def _power(self, handle: str) -> int:
        if isinstance(self.power, Exception):
            raise self.power
        return self.power


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeNvml], None]:
    return lambda fake: monkeypatch.setitem(sys.modules, "pynvml", fake.module())


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600.0
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_readings_of_a_gpu(install: Callable[[FakeNvml], None]) -> None:
    fake = FakeNvml()
    install(fake)
    monitor = DeviceMonitor(seconds=0.01, gpu=2)
    first = monitor.latest
    assert {key: first[key] for key in ("device/utilisation", "gpu_used_mib", "device/power")} == {
        "device/utilisation": 73.0,
        "gpu_used_mib": 3072.0,
        "device/power": 250.0,
    }
    assert first["resident_mib"] == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.2)
    assert fake.asked == [2]
    fake.utilisation = 12
    wait_until(lambda: monitor.latest["device/utilisation"] == 12.0)
    assert "devices" in fake.threads
    monitor.stop()
    monitor.stop()
    assert fake.shut == 1
    assert not any(thread.name == "devices" for thread in threading.enumerate())


def test_one_reading_that_fails_is_said_once(install: Callable[[FakeNvml], None], caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeNvml(power=RuntimeError("Not Supported"))
    install(fake)
    with caplog.at_level(logging.WARNING):
        monitor = DeviceMonitor(seconds=0.005, gpu=0)
        wait_until(lambda: "devices" in fake.threads)
        monitor.stop()
    assert monitor.latest["device/power"] is None
    assert monitor.latest["gpu_used_mib"] == 3072.0
    assert [record.message for record in caplog.records] == ["no reading of the GPU's power (NVML: Not Supported)"]


@pytest.mark.parametrize("why", ["no package", "no driver"])
def test_without_nvml_it_says_so_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    def no_driver() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    module = None if why == "no package" else SimpleNamespace(nvmlInit=no_driver)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    with caplog.at_level(logging.WARNING):
        monitor = DeviceMonitor(seconds=0.005, gpu=0)
        time.sleep(0.05)
        readings = monitor.latest
        monitor.stop()
    assert len(caplog.records) == 1
    assert "training continues without them" in caplog.text
    assert [readings[name] for name in ("device/utilisation", "gpu_used_mib", "device/power")] == [None, None, None]
    assert readings["cpu_percent"] is not None


def test_the_allocator_of_a_gpu_tells_its_largest_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.peak": 3 * 2**30, "reserved_bytes.all.peak": 4 * 2**30, "num_alloc_retries": 2}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    assert largest_memory(torch.device("cuda", 1)) == (3072.0, 4096.0, 2.0)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})  # torch returns this before the first allocation
    assert largest_memory(torch.device("cuda", 1)) == (0.0, 0.0, 0.0)


def test_on_the_cpu_the_largest_memory_is_that_of_the_process() -> None:
    touched = bytearray(b"1") * (32 << 20)
    first = largest_memory(torch.device("cpu"))
    assert first[0] == first[1] >= psutil.Process().memory_info().rss / 2**20 - 1
    assert first[2] == 0
    del touched
    assert largest_memory(torch.device("cpu"))[0] >= first[0]
