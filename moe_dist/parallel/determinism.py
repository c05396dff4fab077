"""The switch `parallel.deterministic`: the same layout, seed and versions give the same bits, run after run.

On the CPU the operations of a step are so already. On CUDA `index_add_` and `scatter_add_` add atomically, in an order that
changes; cuBLAS may share a workspace between streams; cuDNN may choose its kernels by timing them; and NVLink SHARP sums in
an order of the switch's own.
"""

import os
from collections.abc import Mapping

import torch

from moe_dist.errors import ConfigError

# https://docs.nvidia.com/cuda/cublas/#results-reproducibility
_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8", (":4096:8", ":16:8"))
_NCCL = ("NCCL_ALGO", "^NVLS")


def deterministic_variables(given: Mapping[str, str]) -> dict[str, str]:
    """What the environment lacks for results that repeat. cuBLAS and NCCL read it when they are first used.

    Raises:
        ConfigError: it holds a value of which cuBLAS promises nothing.
    """
    name, value, good = _CUBLAS
    if given.get(name, value) not in good:
        raise ConfigError(
            f"parallel.deterministic: environment variable {name}={given[name]!r}; cuBLAS repeats its results with "
            f"{' or '.join(good)} only; unset it, or set it to one of them"
        )
    return {key: text for key, text in ((name, value), _NCCL) if key not in given}


def make_deterministic() -> None:
    """Sets torch, and the environment of what CUDA will load, for the rest of this process. Call it right after torch is
    imported. From then on an operation that has no deterministic form raises a RuntimeError that names it.

    Raises:
        ConfigError: as `deterministic_variables`.
    """
    os.environ.update(deterministic_variables(os.environ))
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling what `torch.empty` returns with NaN finds reads of memory never written; it costs a write of every buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
