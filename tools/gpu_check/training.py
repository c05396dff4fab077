"""Checks training steps, checkpoints and generation on the GPU.

Tokens are random. The tokens of a sequence depend only on the step and the sequence's number, so that any number of ranks
trains on the same sequences. Shape letter: M modalities.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.checkpoint.fingerprint import fingerprint
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.saver import CheckpointWriter
from moe_dist.checkpoint.state import capture
from moe_dist.config.bundled import find_config
from moe_dist.config.load import load_config
from moe_dist.config.schema import Config
from moe_dist.data.batch import BatchMaker, Segment
from moe_dist.formats.manifest import Manifest, SourceSection, SplitSection
from moe_dist.inference.generate import Generator, Request, Sampling
from moe_dist.inference.grammar import grammar_of
from moe_dist.parallel.determinism import make_deterministic
from moe_dist.parallel.mesh import Mesh
from moe_dist.plan.preflight import layout_without_data
from moe_dist.train.build.training import build_training, rank_layout
from moe_dist.train.objective.loss import AuxSettings
from moe_dist.train.step.result import StepResult
from tools.gpu_check.outcome import CheckJob, Reading
from tools.gpu_check.process import on_ranks

SMALL = "adamoe_moma_small_1gpu"
VOCABULARY = 512
SMALL_SIZES = (
    f"model.vocab_size={VOCABULARY}",
    "model.num_layers=2",
    "model.hidden_dim=128",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "data.seq_len=128",
    "train.micro_batch=1",
    "parallel.timeout_seconds=600",
)
TINY_SIZES = ("model.hidden_dim=32", "data.seq_len=24")
MODES = {
    "DDP, fp32": ("parallel.data=ddp", "parallel.precision=fp32"),
    "DDP, bf16": ("parallel.data=ddp", "parallel.precision=bf16"),
    "FSDP2, fp32": ("parallel.data=fsdp2", "parallel.precision=fp32"),
    "FSDP2, bf16": ("parallel.data=fsdp2", "parallel.precision=bf16", "parallel.fsdp_gather=step"),
}
MOST = {"fp32": 1e-4, "bf16": 0.02}  # largest relative difference of losses and gradient norms
STEPS = 3
LEARNING_RATE = 1e-3


def configure(job: CheckJob, mesh: Mesh, overrides: Sequence[str], *, name: str = SMALL, sequences: int = 2) -> Config:
    """Makes a configuration for `mesh`. A step has `sequences` sequences for each GPU of the job, also on a single rank."""
    scale = [f"parallel.ep={mesh.ep_size}", f"parallel.edp={mesh.edp_size}", f"parallel.device={mesh.device.type}"]
    sizes = [*SMALL_SIZES, *(TINY_SIZES if job.rehearse else ())] if name == SMALL else []
    no_data = f"data.path={job.folder / 'none'}"  # a data set at the configured path would be checked
    scale += [f"train.global_batch={sequences * job.gpus}", "placement.policy=interleaved", no_data]
    return load_config(find_config(name), [*sizes, *scale, *overrides])


class RandomRun:
    """Trains a configuration on random tokens, without data on disk."""

    def __init__(self, mesh: Mesh, config: Config) -> None:
        self.config, self.mesh, self.layout = config, mesh, layout_without_data(config)
        vocabulary = config.model.vocab_size
        names = [name for group in self.layout.groups for name in group.modalities]
        edges = [vocabulary * index // len(names) for index in range(len(names) + 1)]
        source = SourceSection(train=SplitSection(path="none", documents=1, tokens=1), licence="none")
        self.manifest = Manifest(
            name="random",
            vocab_size=vocabulary,
            modalities={name: ((edges[i], edges[i + 1]),) for i, name in enumerate(names)},
            pad_id=0,
            eos_id=1,
            sources={"random": source},
        )
        modalities = list(self.manifest.modalities.values())
        self.maker = BatchMaker(seq_len=config.data.seq_len, pad_id=0, modalities=modalities)
        self.training = build_training(config, self.manifest, self.layout.placement, mesh)
        self.step = 0

    def take(self, steps: int) -> list[StepResult]:
        aux = AuxSettings(kind="vanilla", balance=0.0, z=1e-3)  # no balance loss, because it depends on the micro-batches
        results = []
        for _ in range(steps):
            results.append(self.training.step(self._batches(), lr=LEARNING_RATE, aux=aux, number=self.step))
            self.step += 1
        return results

    def _batches(self) -> list[Any]:
        per_rank, micro = self.config.train.global_batch // self.mesh.world_size, self.config.train.micro_batch
        own = range(self.mesh.rank * per_rank, (self.mesh.rank + 1) * per_rank)
        rows = [self._sequence(number) for number in own]
        return [self.maker.make(rows[at : at + micro]) for at in range(0, per_rank, micro)]

    def _sequence(self, number: int) -> list[Segment]:
        """Returns a sequence of two documents of different lengths."""
        rng, length = np.random.default_rng([self.step, number]), self.config.data.seq_len
        lengths = (length // 3, length - length // 3)
        drawn = [rng.integers(2, self.config.model.vocab_size, each) for each in lengths]
        return [Segment(tokens, np.zeros(len(tokens), bool), len(tokens)) for tokens in drawn]

    def bits(self) -> dict[str, int]:
        """Returns the fingerprints of this rank's weights and moments. Valid only under DDP."""
        return {name: fingerprint(tensor) for name, tensor in self._state().tensors().items()}

    def _state(self) -> Any:
        layout = rank_layout(self.layout.placement, self.mesh)
        return capture(self.training.parallel.model, self.training.optimizer, layout, values={}, rank_values={})

    def _manager(self, folder: str) -> CheckpointManager:
        return CheckpointManager(Path(folder), keep=1, lease_check=lambda: None, process_group=self.mesh.checkpoint)

    def save(self, folder: str) -> CheckpointWriter:
        """Starts an asynchronous save, and returns the checkpoint writer, whose `wait` waits until the save has ended."""
        writer = CheckpointWriter(self._manager(folder), asynchronous=True)
        writer.write(self.step, self._state(), durable=False)
        return writer

    def load(self, folder: str) -> None:
        manager = self._manager(folder)
        newest = manager.latest()
        assert newest is not None
        self.step = manager.load(newest, self._state()).step


def steps(job: CheckJob) -> list[Reading]:
    """Measures the largest difference of losses and gradient norms from those of one CPU rank, for each of `MODES`."""
    (exact,) = on_ranks(_losses, job, ["DDP, fp32"], world=1, device="cpu")
    found = on_ranks(_losses, job, list(MODES))[0]
    readings = []
    for mode, losses in found.items():
        worst = float(np.abs(np.array(losses) / np.array(exact["DDP, fp32"]) - 1).max())
        readings.append(Reading(f"{mode}: difference of losses and gradient norms", worst, most=MOST[mode[-4:]]))
    return readings


def _losses(job: CheckJob, mesh: Mesh, modes: list[str]) -> dict[str, list[float]]:
    made = {}
    for mode in modes:
        made[mode] = losses_and_norms(RandomRun(mesh, configure(job, mesh, MODES[mode])).take(STEPS))
    return made


def losses_and_norms(results: Sequence[StepResult]) -> list[float]:
    """Returns the loss and the gradient norm of each step, in one list."""
    return [x for each in results for x in (float(each.nll_M.sum() / each.labels_M.sum()), each.grad_norm)]


def repeat(job: CheckJob) -> list[Reading]:
    """Counts the ranks whose weights and moments are bit-equal in two cases: in a second run, and in new processes that
    resume from an asynchronously saved checkpoint of ended processes. Also measures the time that determinism costs."""
    usual = on_ranks(_paced, job, False)[0]
    make_deterministic()  # called here too, because NCCL reads its environment variables before `_repeated` begins
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        found, resumed = on_ranks(_repeated, job, folder), on_ranks(_resumed, job, folder)
    slow = on_ranks(_paced, job, True)[0]
    again = sum(each["again"] == each["bits"] for each in found)
    restored = sum(each == first["bits"] for each, first in zip(resumed, found, strict=True))
    return [
        Reading("the same run twice: ranks with equal bits", again, least=len(found)),
        Reading("resumed from a checkpoint: ranks with equal bits", restored, least=len(found)),
        job.timed("seconds of a deterministic step / of a usual one", slow / usual),
    ]


def _deterministic(job: CheckJob, mesh: Mesh) -> RandomRun:
    make_deterministic()
    return RandomRun(mesh, configure(job, mesh, (*MODES["DDP, bf16"], "parallel.deterministic=true")))


def _repeated(job: CheckJob, mesh: Mesh, folder: str) -> dict[str, dict[str, int]]:
    """Returns the final fingerprints of two runs of three steps. The first run saves step 2 while it computes step 3."""
    first = _deterministic(job, mesh)
    first.take(2)
    writer = first.save(folder)
    first.take(1)
    writer.wait()
    second = _deterministic(job, mesh)
    second.take(3)
    return {"bits": first.bits(), "again": second.bits()}


def _resumed(job: CheckJob, mesh: Mesh, folder: str) -> dict[str, int]:
    run = _deterministic(job, mesh)
    run.load(folder)
    run.take(1)
    return run.bits()


def _paced(job: CheckJob, mesh: Mesh, deterministic: bool) -> float:
    """Returns the mean seconds of a step."""
    run = _deterministic(job, mesh) if deterministic else RandomRun(mesh, configure(job, mesh, MODES["DDP, bf16"]))
    run.take(2)
    steps, began = 1 if job.rehearse else 5, time.perf_counter()
    run.take(steps)
    return (time.perf_counter() - began) / steps


def generation(job: CheckJob) -> list[Reading]:
    """Generates the likeliest tokens in fp32 with the key-value cache, on the device and on the CPU, and compares them."""
    made = {device: on_ranks(_generated, job, world=1, device=device)[0] for device in (job.device, "cpu")}
    same = np.mean(np.array(made[job.device]) == np.array(made["cpu"]))
    return [Reading("share of equal tokens", float(same), least=1.0)]


def _generated(job: CheckJob, mesh: Mesh) -> list[list[int]]:
    run = RandomRun(mesh, configure(job, mesh, (*MODES["DDP, fp32"], "model.init_std=0.2")))
    model, length = run.training.parallel.model, run.config.model.max_seq_len
    grammar = grammar_of(run.manifest, vocab_size=run.config.model.vocab_size, never=[1])
    groups = run.training.step.group_of_modality.tolist()
    generator = Generator(model, grammar, group_of_modality=groups, max_seq_len=length)  # pyright: ignore[reportArgumentType]
    prompts = [[5, 6, 7], [400, 9]]
    return generator(prompts, Request(max_new_tokens=8, sampling=Sampling(temperature=0.0)))
