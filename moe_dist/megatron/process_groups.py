"""Creates Megatron's process groups on top of the default process group."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def model_parallel(
    *, ep: int = 1, tp: int = 1, pp: int = 1, vpp: int = 1, cp: int = 1, seed: int = 1234, timeout: float = 1800.0
) -> Iterator[None]:
    """Makes Megatron's process groups, and seeds its random states. `timeout` limits every collective, in seconds, which
    are rounded up to minutes, because Megatron counts in minutes.

    The degree of expert tensor parallelism is 1, and expert parallelism uses the ranks of TP x CP x DP. On exit the groups
    are destroyed, and Megatron's tracker of MoE losses is emptied.
    """
    from megatron.core import parallel_state  # imported here, because a CPU trial first replaces names
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from moe_dist.megatron.versions import clear_tracker

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=math.ceil(timeout / 60),
    )
    try:
        model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        clear_tracker()


def process_groups() -> Any:
    """Returns this rank's Megatron groups as a ProcessGroupCollection. Call this function inside `model_parallel`."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()
