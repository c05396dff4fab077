"""Takes training steps of a configuration as one rank of many, on fake CUDA tensors and with collectives that do nothing.

Runs in a process with the environment of `fake_cuda.preloaded`: python -m research.fake_gpu.fake_step CONFIG RANK RANKS
[key=value ...]. Prints one JSON line with the fields of `Counted`. Routing is uniform: each rank sends each expert the
same number of tokens.

DDP's wrapper is not used, because DDP's reducer reads memory. torch.compile is not used; attention counts as one kernel.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_dist.comm.collectives import CommStats
from moe_dist.config.load import load_config
from moe_dist.config.schema import Config
from moe_dist.data.batch import Batch
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.model.transformer import Layer
from moe_dist.moe.layer import MoELayer
from moe_dist.parallel import parallelize
from moe_dist.parallel.mesh import Mesh, make_mesh, pretend_world
from moe_dist.placement.placement import group_shares
from moe_dist.plan.preflight import PlannedLayout, layout_without_data
from moe_dist.train.build import training as build
from moe_dist.train.objective.loss import AuxSettings
from moe_dist.train.step import training_step as step
from research.fake_gpu import fake_cuda

MICRO_BATCHES = 2
TIMEOUT = 60.0


@dataclass(frozen=True)
class Counted:
    """The counts of one step with `MICRO_BATCHES` micro-batches. The counted step is the second step.

    Attributes:
        layers: Number of layers with the part "attention", "moe" or "ffn". The counts of these parts are sums over all
            layers. The other parts are "model", "loss" and "step".
        kernels, num_bytes: Numbers of kernels and bytes, by "part phase"; phases are forward, backward and step.
        collectives: Number of collectives, by "part phase name".
        syncs, copies: Number of times that the host waits for values, and for copies, by "phase name".
        mixed: Operations with both CPU and CUDA tensors.
        sorted_sums: Number of backward passes of indexing, which sort on CUDA, by part.
        order: The names of all collectives of the two steps, in call order; equal on all ranks.
        tracked: Number of collectives that the tracker still listed as running at the end of the step.
        exchange_seconds: Seconds in exchanges that the busy clock subtracts if each wait takes `fake_cuda.WAIT_SECONDS`.
        work, sent: Lists of the fields of `fake_cuda.Work` and `fake_cuda.Sent`, each followed by how often it occurred.
        more_work, more_sent: The operations and collectives that one more micro-batch adds.
        memory: For each "part phase": allocated minus freed bytes, the largest number of live bytes, and its layer.
    """

    config: str
    rank: int
    ranks: int
    layers: dict[str, int]
    kernels: dict[str, int]
    num_bytes: dict[str, int]
    collectives: dict[str, int]
    syncs: dict[str, int]
    copies: dict[str, int]
    mixed: dict[str, int]
    sorted_sums: dict[str, int]
    order: str
    tracked: int
    exchange_seconds: float
    work: list[list[Any]] = field(default_factory=list)
    sent: list[list[Any]] = field(default_factory=list)
    more_work: list[list[Any]] = field(default_factory=list)
    more_sent: list[list[Any]] = field(default_factory=list)
    memory: dict[str, tuple[int, int, int]] = field(default_factory=dict)


def scaled(overrides: Sequence[str], path: str, ranks: int) -> Config:
    """Returns the configuration on `ranks` ranks. EP groups have the configured size, but at most `ranks` ranks."""
    config = load_config(path, overrides)
    ep = min(config.parallel.ep, ranks)
    if ranks % ep:
        raise ConfigError(
            f"--ranks {ranks}: must be a multiple of parallel.ep={ep}; take {ranks + -ranks % ep}, or set parallel.ep"
        )
    changes = {
        "parallel.ep": ep,
        "parallel.edp": ranks // ep,
        "parallel.device": "cuda",
        "train.global_batch": ranks * config.train.micro_batch * MICRO_BATCHES,
    }
    return load_config(path, [*overrides, *(f"{key}={value}" for key, value in changes.items())])


class Uniform:
    """Replaces the counts that the host reads by the counts of a uniform router. The name of a read selects the counts.
    Until `route` sets another number of tokens, a layer routes half a micro-batch with two-batch overlap. Without
    two-batch overlap, or with `whole`, it routes a whole micro-batch."""

    def __init__(self, config: Config, layout: PlannedLayout, rank: int, *, whole: bool = False) -> None:
        self.config, self.placement, self.own = config, layout.placement, rank % config.parallel.ep
        tokens = config.train.micro_batch * config.data.seq_len // (1 + (config.parallel.two_batch_overlap and not whole))
        self.groups = layout.groups
        self.route(tokens)

    def route(self, tokens: int) -> None:
        """Sets the number of tokens that a layer routes on this rank. Each modality has the same number of tokens."""
        tokens_G = [tokens * share for share in group_shares(self.groups, {})]
        self.tokens_of_groups = list(zip(self.groups, tokens_G, strict=True))
        self.pairs_E = [
            tokens * group.expected_experts_per_token / group.num_experts
            for group, tokens in self.tokens_of_groups
            for _ in group.experts
        ]

    def entry(self, ep_rank: int, chunks: int = 1) -> list[int]:
        """Returns the number of token rows sent to a rank, and for each expert of that rank the number of its (token,
        expert) pairs."""
        pairs = [int(self.pairs_E[expert] / chunks) for expert in self.placement.slots[ep_rank]]
        return [min(sum(pairs), int(self.rows([ep_rank]) / chunks)), *pairs]

    def rows(self, ep_ranks: Sequence[int]) -> float:
        """Returns the number of tokens that chose an expert on at least one of the ranks `ep_ranks`."""
        return sum(
            tokens * group.reached(sum(len(self.placement.local_experts(rank, group)) for rank in ep_ranks))
            for group, tokens in self.tokens_of_groups
        )

    def __call__(self, stats: CommStats, name: str, counts: Tensor) -> list[int]:
        length, ep = counts.shape[0], self.config.parallel.ep
        if name == "split sizes":
            chunks = getattr(self.config.parallel.dispatch, "chunks", 1)
            sent = [x for rank in range(ep) for x in self.entry(rank, chunks) * chunks]
            received = self.entry(self.own, chunks) * chunks * ep
            return sent if length == len(sent) else sent + received
        if name == "split sizes of both hops":
            return self._both_hops(ep)
        if name == "tokens of each rank and group":  # [ranks, micro-batches, groups]
            return [int(tokens) for _, tokens in self.tokens_of_groups] * (length // len(self.tokens_of_groups))
        if name == "LoRA pairs of each expert":
            return [int(pairs) for pairs in self.pairs_E]
        raise AssertionError(f"a uniform router has no answer to the read of {name!r}")

    def _both_hops(self, ep: int) -> list[int]:
        local = self.config.parallel.dispatch.node_size or 1
        nodes = [range(first, first + local) for first in range(0, ep, local)]
        to_node = [[int(self.rows(node)), *chain(*map(self.entry, node))] for node in nodes]
        mine, num = self.own // local, len(nodes)
        forwarded = [num * x for x in to_node[mine][1:]]
        arriving = [num * x for x in self.entry(self.own)] * local
        return [*chain(*to_node), *to_node[mine] * num, *forwarded, *arriving]


def watch_parts(model: nn.Module, recorder: fake_cuda.Recorder) -> Counter[str]:
    """Sets hooks that tell the recorder which part of the model runs. Returns the number of layers with each part."""
    names = []

    def at(name: str, layer: int) -> None:
        recorder.part, recorder.memory.layer = name, layer

    def enter(name: str, layer: int) -> None:
        at(name, layer)
        if name == "model":
            recorder.phase = "forward"

    def leave(name: str, layer: int, output: Any) -> None:
        """Marks the end of a part in forward. In backward, a hook on the output's gradient marks the part's beginning."""
        out = output[0] if isinstance(output, tuple) else output
        if out.requires_grad:
            out.register_hook(lambda _: at(name, layer))
        recorder.part = "model" if name != "model" else "loss"

    def in_halves(name: str, layer: int, steps: Any) -> Any:
        """Wraps the generator `MoELayer.steps`, which yields at each exchange."""

        def run(*args: Any) -> Any:
            chain, pieces = args[3], steps(*args)
            while True:
                enter(name, layer)
                try:
                    next(pieces)
                except StopIteration as end:
                    leave(name, layer, end.value)
                    return end.value
                leave(name, layer, chain.end)
                yield

        return run

    def watch(name: str, layer: int, module: nn.Module) -> None:
        names.append(name)
        module.register_forward_pre_hook(
            lambda *_: enter(name, layer), prepend=True
        )  # runs before FSDP2's own hook, which gathers parameters
        module.register_forward_hook(lambda *every: leave(name, layer, every[2]))
        if name == "model" or not model.in_halves:
            return
        if name == "moe":
            module.steps = in_halves(name, layer, module.steps)  # pyright: ignore[reportAttributeAccessIssue]
            return
        forward = module.forward

        def run(*args: Any) -> Any:  # two-batch overlap calls no hooks
            enter(name, layer)
            made = forward(*args)
            leave(name, layer, made)
            return made

        module.forward = run

    for number, layer in enumerate(model.units() if hasattr(model, "family") else model.layers):  # pyright: ignore
        if hasattr(model, "family"):
            watch("moe", number, layer)  # a whole layer, attention included
            continue
        assert isinstance(layer, Layer)
        watch("attention", number, layer.attention)
        watch(*(("moe", number, layer.moe) if layer.has_experts else ("ffn", number, layer.ffn)))
    watch("model", 0, model)
    return Counter(names[:-1])


def batch_of(config: Config) -> Batch:
    shape = (config.train.micro_batch, config.data.seq_len)
    integers = [torch.zeros(shape, dtype=torch.int64) for _ in range(5)]
    tokens, labels, positions, modality, label_modality = integers
    documents, flags = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
    return Batch(tokens, labels, positions, documents, modality, label_modality, flags, flags.clone())


class _NoMeta:
    """Replaces torch in `build`, so that models are built on the fake device. Fake tensors cannot leave the meta device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *args: Any) -> torch.device:
        return torch.device("cuda:0") if args == ("meta",) else torch.device(*args)


@dataclass(frozen=True)
class Built:
    """One rank's model on fake CUDA tensors, with its training step. For each step, `told` has the seconds of exchanges
    that the busy clock subtracted."""

    config: Config
    layout: PlannedLayout
    manifest: Any
    mesh: Mesh
    recorder: fake_cuda.Recorder
    training: build.Training
    told: list[float]

    @property
    def aux(self) -> AuxSettings:
        return AuxSettings(self.config.loss.balance.kind, 0.01, self.config.loss.z)


@contextmanager
def built(path: str, rank: int, ranks: int, overrides: Sequence[str]) -> Iterator[Built]:
    """Builds the model of rank `rank` of `ranks`. The replacements of `stand_ins` last until the end of the block."""
    config = scaled(overrides, path, ranks)
    layout, recorder = layout_without_data(config), fake_cuda.Recorder()
    uniform = Uniform(config, layout, rank)

    def to_host(stats: CommStats, name: str, counts: Tensor) -> list[int]:
        recorder.read(name)
        return uniform(stats, name, counts)

    real_route = MoELayer._route

    def route(layer: MoELayer, x_TD: Tensor, *args: Any) -> Any:  # mixture of depths and evaluation change the number
        uniform.route(len(x_TD))
        return real_route(layer, x_TD, *args)

    told: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(fake_cuda.stand_ins(recorder))
        seconds = mock.patch.object(step.BusyClock, "seconds", lambda clock, waited: told.append(waited) or 0.0)
        stack.enter_context(seconds)
        stack.enter_context(mock.patch.object(CommStats, "to_host", to_host))
        stack.enter_context(mock.patch.object(MoELayer, "_route", route))
        stack.enter_context(mock.patch.object(build, "torch", _NoMeta()))
        stack.enter_context(mock.patch.object(parallelize, "_wrap_ddp", lambda model, mesh: model))
        pretend_world(rank=rank, world_size=ranks)
        stack.callback(dist.destroy_process_group)
        size = config.parallel.dispatch.node_size
        mesh = make_mesh(ep=config.parallel.ep, device=torch.device("cuda:0"), timeout=TIMEOUT, ranks_per_node=size)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        names = [name for group in layout.groups for name in group.modalities]
        modalities = {name: () for name in dict.fromkeys(names)}
        manifest: Any = SimpleNamespace(modalities=modalities, pad_id=0)
        manifest.pictures = None
        if config.engine.hosts:
            training = stack.enter_context(_hosted(build.EngineContext(config, manifest, layout.placement, mesh)))
        else:
            training = build.build_training(config, manifest, layout.placement, mesh)
        yield Built(config, layout, manifest, mesh, recorder, training, told)


@contextmanager
def _hosted(context: build.EngineContext) -> Iterator[Any]:
    """Builds a model of transformers. Weights are not drawn, and the documents of a sequence are kept apart."""
    from moe_dist.hf.host.model import HostedModel
    from moe_dist.train.build import hosted

    with ExitStack() as stack:
        for owner, name in ((hosted, "draw"), (HostedModel, "ready")):
            stack.enter_context(mock.patch.object(owner, name))
        stack.enter_context(mock.patch.object(hosted, "torch", _NoMeta()))
        yield stack.enter_context(hosted.transformers_engine(context))


def count_step(path: str, rank: int, ranks: int, overrides: Sequence[str]) -> Counted:
    """Builds the model, takes two steps, and returns the counts of the second step."""
    with built(path, rank, ranks, overrides) as each:
        config, recorder, training = each.config, each.recorder, each.training
        layers = watch_parts(training.parallel.model, recorder)

        def take(number: int, micro_batches: int) -> Any:
            recorder.part = recorder.phase = "step"
            before = recorder.work.copy(), recorder.sent.copy()
            with recorder:
                training.step([batch_of(config) for _ in range(micro_batches)], lr=1e-4, aux=each.aux, number=number)
            return recorder.work - before[0], recorder.sent - before[1]

        take(0, MICRO_BATCHES)
        for counter in (recorder.kernels, recorder.num_bytes, recorder.collectives, recorder.syncs, recorder.copies):
            counter.clear()
        recorder.memory.clear()
        work, sent = take(1, MICRO_BATCHES)
        counted = Counted(
            config=config.run.name,
            rank=rank,
            ranks=ranks,
            layers=dict(layers),
            kernels=_joined(recorder.kernels),
            num_bytes=_joined(recorder.num_bytes),
            collectives=_joined(recorder.collectives),
            syncs=_joined(recorder.syncs),
            copies=_joined(+recorder.copies),
            mixed=dict(recorder.mixed),
            sorted_sums=dict(recorder.sorted_sums),
            order=" ".join(recorder.order),
            tracked=len(each.mesh.tracker._unfinished),
            exchange_seconds=each.told[-1],
            memory={
                " ".join(at): (recorder.memory.grown[at], most, recorder.memory.layer_of_most[at])
                for at, most in recorder.memory.most.items()
            },
            work=_listed(work),
            sent=_listed(sent),
        )
        more_work, more_sent = take(2, MICRO_BATCHES + 1)
        more_work.subtract(work)  # keeps negative numbers
        more_sent.subtract(sent)
        return replace(counted, more_work=_listed(more_work), more_sent=_listed(more_sent))


def _listed(counter: Counter[Any]) -> list[list[Any]]:
    return [[*key, count] for key, count in counter.items() if count]


def _joined(counter: Counter[Any]) -> dict[str, int]:
    return {" ".join(key): count for key, count in sorted(counter.items())}


if __name__ == "__main__":
    fake_cuda.enter()
    try:
        print(json.dumps(asdict(count_step(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))))
    except MoeDistError as error:
        sys.exit(str(error))
