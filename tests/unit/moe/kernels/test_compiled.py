"""Compiles the Triton kernels for GPUs that this machine lacks, and checks the report of NVIDIA's assembler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each of these kernels may use at most this number of bytes of shared memory. All other kernels use none.
SHARED = {"swiglu backward": 16, "choose": 2048, "choose backward": 4096}
SHARED |= {"plan: scan": 32, "plan: count": 512, "plan: collect": 256, "plan: place": 4096}
SHARED |= {f"experts choose: {name}": size for name, size in (("candidates", 2048), ("take", 4096), ("sums", 2048))}
SHARED |= {"norm": 16_384, "backward of norm": 16_384, "cross entropy": 16}
SHARED |= {"normed rotary": 64, "backward of normed rotary": 4096}
MOST_REGISTERS = 128  # per thread, so that 4 blocks of 128 threads fit on a multiprocessor


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ["90", "80", "100"])
def test_no_kernel_spills_registers(architecture: str) -> None:
    command = [sys.executable, "-m", "tests.support.compiled_kernels", architecture]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[4], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [kernels] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 57
    for name, report in kernels.items():
        assert report["stores"] == report["loads"] == report["stack"] == 0, f"{name} spills registers: {report}"
        assert report["registers"] <= MOST_REGISTERS, f"{name}: {report}"
        assert report["shared"] <= SHARED.get(name.partition(",")[0], 0), f"{name}: {report}"
        # these kernels load 8-byte integers, or pairs
        narrow = name.startswith(("plan", "experts choose: take")) or "neighbours" in name
        assert report["vectors"] or narrow, f"{name} reads or writes no 16 bytes at once: {report}"
