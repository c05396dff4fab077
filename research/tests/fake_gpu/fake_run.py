"""Runs, on fake CUDA tensors, the parts of a run that are not training steps: the held-out evaluation, and the copies of
asynchronous saves.

`python -m research.tests.fake_gpu.fake_run CONFIG RANK RANKS [key=value ...]`, in a process that
`research.fake_gpu.fake_cuda.child` started, prints JSON of `observed`.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from moe_dist.checkpoint import storage
from moe_dist.checkpoint.storage import Snapshot, take_snapshot
from moe_dist.data.batch import Batch
from moe_dist.train.evaluation.evaluator import Evaluator
from moe_dist.train.start import resume
from research.fake_gpu import fake_cuda, fake_step


def observed(run: fake_step.Built, trained: Sequence[Batch], *, held_out: int = 2) -> dict[str, Any]:
    """Takes two training steps, the evaluation at the end of a run on `held_out` batches, and two saves.

    Returns an entry for each of "first step", "step", "evaluation", "first save" and "save". It has the host's reads by
    name (by file if the name is a source line), the copies for which the host waits (by file), operations on tensors of
    both devices, and the names of collectives in order. The entry "snapshot" has, for the second save, the numbers of
    tensors and copies, whether all tensors are on the host, and whether they are the tensors of the first save.
    """
    found: dict[str, Any] = {}
    recorder, training = run.recorder, run.training

    def generators(_: torch.device) -> dict[str, Any]:
        recorder.read("state of the device's generator")
        return {}

    def note(name: str, act: Callable[[], object]) -> None:
        recorder.part = recorder.phase = name
        noted, order = (recorder.syncs, recorder.copies, recorder.mixed), recorder.order
        for each in (*noted, order):
            each.clear()
        with recorder:
            act()
        reads, copies, mixed = (_by_file(each) for each in noted)
        found[name] = {"reads": reads, "copies": copies, "mixed": mixed, "order": " ".join(order)}

    for number, name in enumerate(("first step", "step")):
        note(name, lambda number=number: training.step(trained, lr=1e-4, aux=run.aux, number=number))
    evaluator = Evaluator(
        run.config, run.manifest, training.parallel, run.layout.placement, training.step.group_of_modality
    )
    batches = [fake_step.batch_of(run.config) for _ in range(held_out)]
    with mock.patch.object(Evaluator, "batches", return_value=batches):
        note("evaluation", lambda: evaluator(1, final=True, trained=trained[: evaluator.calibration]))

    snapshots: list[Snapshot] = []
    # rank 1, because rank 0 would log the committed folder
    checkpoints: Any = SimpleNamespace(rank=1, snapshot=take_snapshot, write=snapshots.append)
    saver = resume.Resumable(training, run.layout.placement, checkpoints, run.config, run.manifest)
    fake = mock.patch.object(storage, "check_finite", return_value=None)  # fake tensors have no values to check
    with fake, mock.patch.object(resume, "generator_states", generators):
        for name in ("first save", "save"):
            note(name, lambda: saver.save(resume.Progress(step=1), durable=True))
    first, second = ([piece.tensor for piece in each.pieces.values()] for each in snapshots)
    found["snapshot"] = {
        "tensors": len(second),
        "copies": recorder.kernels["save", "save"],
        "on host": all(each.device.type == "cpu" for each in second),
        "same memory": all(one is two for one, two in zip(first, second, strict=True)),
    }
    return found


def _by_file(noted: Counter[Any]) -> dict[str, int]:
    """Leaves out phases and line numbers, because any edit of a file changes them."""
    found: Counter[str] = Counter()
    for key, number in noted.items():
        found[(key if isinstance(key, str) else key[-1]).split(".py:")[0]] += number
    return dict(+found)


def main() -> None:
    path, rank, ranks, *overrides = sys.argv[1:]
    fake_cuda.enter()
    with fake_step.built(path, int(rank), int(ranks), overrides) as run:
        trained = [fake_step.batch_of(run.config) for _ in range(fake_step.MICRO_BATCHES)]
        print(json.dumps(observed(run, trained)))


if __name__ == "__main__":
    main()
