"""Implements `parallel.deterministic`: runs with the same layout, seed and versions then give bit-identical results.

On CPU a step is always deterministic. On CUDA four things can change bits from run to run: atomic additions in `index_add_`
and `scatter_add_`, cuBLAS workspaces shared by streams, cuDNN kernels chosen by timing, and sums in NVLink SHARP.
"""

import os
from collections.abc import Mapping

import torch

from moe_dist.errors import ConfigError

# https://docs.nvidia.com/cuda/cublas/#results-reproducibility
_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8", (":4096:8", ":16:8"))
# NCCL algorithms whose sums a switch or network device may compute. Between nodes NCCL uses NVLSTree, inside a node NVLS.
_NCCL = ("NCCL_ALGO", "^NVLS,NVLSTree,CollNetDirect,CollNetChain")


def deterministic_variables(given: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables that make cuBLAS and NCCL deterministic, without those that `given` already has.
    Both libraries read their variables when they are first used. Raises ConfigError if `given` has a value with which
    cuBLAS is not deterministic."""
    name, value, good = _CUBLAS
    if given.get(name, value) not in good:
        raise ConfigError(
            f"parallel.deterministic: environment variable {name}={given[name]!r}; cuBLAS is deterministic only with "
            f"{' or '.join(good)}; unset the variable, or set it to one of them"
        )
    return {key: text for key, text in ((name, value), _NCCL) if key not in given}


def make_deterministic() -> None:
    """Makes torch and the CUDA libraries deterministic in this process. Call this function right after importing torch.
    Afterwards an operation that has no deterministic implementation raises a RuntimeError with its name. Raises
    ConfigError: see `deterministic_variables`."""
    os.environ.update(deterministic_variables(os.environ))
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # otherwise timing could choose different kernels in each run
    # If True, torch would fill every `torch.empty` with NaN to reveal uninitialised reads, at the cost of a write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
