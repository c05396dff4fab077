"""Runs the trials of the kernels under NVIDIA's compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tools.gpu_check.outcome import CheckJob, NotPossibleError, Reading


def sanitizer(job: CheckJob) -> list[Reading]:
    """Checks with NVIDIA's compute-sanitizer that no kernel trial makes an invalid memory access. With `rehearse`, only
    runs the trials, without the sanitizer."""
    tool = [] if job.rehearse else ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    if tool and shutil.which(tool[0]) is None:
        raise NotPossibleError("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    command = [*tool, sys.executable, "-m", "research.gpu_bench.sanitizer", job.device]
    # Each tensor gets its own allocation, because compute-sanitizer checks only the bounds of allocations.
    alone, root = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=alone, capture_output=True, text=True, timeout=job.seconds)
    print(done.stdout, done.stderr)
    if done.returncode not in (0, 9):
        raise AssertionError(f"the trials ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}")
    return [Reading("memory errors found", float(done.returncode == 9), most=0.0)]


def trials(device: torch.device) -> str | None:
    """Runs the trials of all kernels. Returns None, or a message if a kernel differs from torch."""
    from moe_dist.model.kernels.choice import why_not as why_not_dense
    from moe_dist.model.kernels.triton_kernels import TRITON as DENSE
    from moe_dist.moe.kernel_choice import why_not
    from moe_dist.moe.kernels.triton_kernels import TRITON

    return why_not(TRITON, device, torch.bfloat16) or why_not_dense(DENSE, device, torch.bfloat16)


if __name__ == "__main__":
    sys.exit(trials(torch.device(sys.argv[1])))
