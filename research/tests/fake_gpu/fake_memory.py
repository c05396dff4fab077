"""Measures the peak memory of a later training step on fake CUDA tensors by torch's MemTracker, and prints bytes.

Runs in a process that `research.fake_gpu.fake_cuda.child` started, with CONFIG RANK RANKS [key=value ...].
"""

import sys
from typing import Any

from torch.distributed._tools.mem_tracker import MemTracker

from moe_dist.train.step.training_step import TrainingStep
from research.fake_gpu import fake_cuda, fake_step


def main() -> None:
    path, rank, ranks, *overrides = sys.argv[1:]
    fake_cuda.enter()
    step, peaks = TrainingStep.__call__, []
    # a second active dispatch mode would count the tracker's own operations
    fake_cuda.Recorder.__enter__ = lambda self: self  # pyright: ignore[reportAttributeAccessIssue]
    fake_cuda.Recorder.__exit__ = lambda self, *_: None  # pyright: ignore[reportAttributeAccessIssue]

    def measured(self: TrainingStep, *args: Any, **named: Any) -> Any:
        tracker = MemTracker()
        tracker.track_external(self.parallel.model, self.optimizer)
        before = tracker._pre_fw_hook

        def begin(module: Any, inputs: Any) -> None:
            if module is self.parallel.model:
                tracker.reset_mod_stats()  # the tracker keeps the statistics of only one forward
            before(module, inputs)

        tracker._pre_fw_hook = begin
        with tracker:
            result = step(self, *args, **named)
        found = tracker.get_tracker_snapshot("peak")
        peaks.append(next(sizes["Total"] for device, sizes in found.items() if device.type == "cuda"))
        return result

    TrainingStep.__call__ = measured  # pyright: ignore[reportAttributeAccessIssue]
    fake_step.count_step(path, int(rank), int(ranks), overrides)
    print(peaks[-1])  # not the first step, in which the tracker counts whole tensors instead of the optimizer's shards


if __name__ == "__main__":
    main()
