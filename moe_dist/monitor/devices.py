"""Reads the state of GPU and host on a background thread. The training loop therefore never waits for a driver."""

import logging
import threading
from collections.abc import Mapping
from typing import Any

import psutil

logger = logging.getLogger(__name__)

MIB = 2**20


class DeviceMonitor:
    """Reads the state of GPU and host every `seconds` seconds until `stop` is called.

    Args:
        gpu: UUID (str(torch.cuda.get_device_properties(device).uuid)) or NVML index of this rank's GPU; None if the run is
            on the CPU. A UUID is safer, because an NVML index ignores CUDA_VISIBLE_DEVICES and counts the machine's GPUs.

    Attributes:
        latest: The latest readings. device/utilisation (percent), device/power (watts) and gpu_used_mib (by all processes)
            are None if they cannot be read. Without a GPU, device/utilisation is the host's CPU utilisation. cpu_percent
            (of all cores) and resident_mib (of this process) describe the host.
    """

    def __init__(self, *, seconds: float, gpu: str | int | None = None) -> None:
        self._seconds = seconds
        self._process = psutil.Process()
        psutil.cpu_percent()  # the next call returns the mean since this call
        self._gpu = _Gpu(gpu) if gpu is not None else None
        self.latest: Mapping[str, float | None] = self._take()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = threading.Thread(target=self._loop, name="devices", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the monitor's thread and releases NVML. Further calls do nothing."""
        if self._thread is None:
            return
        self._stopped.set()
        self._thread.join()  # waits at most for the end of the current reading
        self._thread = None
        if self._gpu is not None:
            self._gpu.close()

    def _loop(self) -> None:
        while not self._stopped.wait(self._seconds):
            self.latest = self._take()  # one assignment, so that a reader never sees a mix of old and new values

    def _take(self) -> dict[str, float | None]:
        host = {"cpu_percent": psutil.cpu_percent(), "resident_mib": self._process.memory_info().rss / MIB}
        if self._gpu is not None:
            return {**self._gpu.read(), **host}
        return {"device/utilisation": host["cpu_percent"], "device/power": None, **host}


class _Gpu:
    """One GPU, read through NVML. A failed reading is None; for each kind of reading, only the first failure is logged."""

    def __init__(self, gpu: str | int) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self._said: set[str] = set()
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            if isinstance(gpu, str):
                uuid = gpu if gpu.startswith(("GPU-", "MIG-")) else f"GPU-{gpu}"  # torch's UUIDs lack this prefix
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            else:
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(gpu)
        except Exception as error:  # training needs neither pynvml nor a driver nor a GPU
            self._say("nvml", f"no readings of GPU {gpu} (NVML: {error}); training continues without them")

    def read(self) -> dict[str, float | None]:
        return {
            "device/utilisation": self._value("utilisation", lambda n, h: float(n.nvmlDeviceGetUtilizationRates(h).gpu)),
            "gpu_used_mib": self._value("memory", lambda n, h: n.nvmlDeviceGetMemoryInfo(h).used / MIB),
            "device/power": self._value("power", lambda n, h: n.nvmlDeviceGetPowerUsage(h) / 1000),
        }

    def close(self) -> None:
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = None

    def _value(self, name: str, get: Any) -> float | None:
        if self._nvml is None or self._handle is None:
            return None
        try:
            return get(self._nvml, self._handle)
        except Exception as error:  # pynvml uses one class for 'not supported' (power of some cards) and for 'GPU is lost'
            self._say(name, f"no reading of the GPU's {name} (NVML: {error})")
            return None

    def _say(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            logger.warning(text)
