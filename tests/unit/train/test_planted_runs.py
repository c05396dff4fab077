"""Faults planted in real tiny runs are named, by both engines that run on one rank. The same runs without a fault get no
such hint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.data.loader import TrainLoader
from moe_dist.monitor.hints import HintWatch
from tests.support.engine_run import Run, built_run
from tests.support.hosted import hosted_config, of_family
from tests.support.one_rank import world_of_one
from tests.support.tiny import TEXT_IDS, tiny_config

BEGIN, STEPS = 36, 75
CHANGES = {"parallel.ep": 1, "optimizer.lr": 1e-2, "placement": {"policy": "interleaved"}, "train.steps": STEPS}
GROUP = {"num_experts": 6, "top_k": 2, "ffn_dim": 16, "modalities": ["text", "image"]}
ENGINES: dict[str, Callable[..., Any]] = {
    "moe_dist": lambda data, root, changes: tiny_config(data, root, {**changes, "model.moe.groups": {"all": GROUP}}),
    "transformers": lambda data, root, changes: hosted_config(data, root, of_family("mixtral"), changes),
}


def hints(run: Run) -> dict[str, str]:
    """Trains, and returns the hints by kind."""
    said: dict[str, str] = {}
    watch = HintWatch(run.placement.groups, run.config.model.moe_layers)

    class Sink:
        def step(self, record: Any) -> None:
            said.update({hint.kind: hint.text for hint in watch.update(record)})

    trainer = run.trainer(run.saver(), sinks=[Sink()])
    for _ in range(STEPS):
        trainer._step()
    return said


def healthy(_run: Run, _patch: pytest.MonkeyPatch) -> None: ...


def corrupt_source(run: Run, patch: pytest.MonkeyPatch) -> None:
    """From step BEGIN on, the labels of prose are random."""
    read, generator = TrainLoader.batches, torch.Generator().manual_seed(0)

    def batches(loader: TrainLoader, position: int) -> list[Any]:
        found = read(loader, position)
        if position < BEGIN * run.config.train.global_batch:
            return found
        prose, changed = loader.source_names.index("prose"), []
        for batch, source_SB in zip(found, loader.sources(position), strict=True):
            random = torch.randint(*TEXT_IDS, batch.labels_BS.shape, generator=generator)
            bad_BS = torch.tensor(source_SB[prose] == 1)[:, None] & (batch.labels_BS >= 0)
            changed.append(replace(batch, labels_BS=torch.where(bad_BS, random, batch.labels_BS)))
        return changed

    patch.setattr(TrainLoader, "batches", batches)


def scaled_output(factor: float) -> Callable[[Run, pytest.MonkeyPatch], None]:
    """Code between the experts and the layer's output multiplies the weighted output of expert 1 of the first layer."""

    def plant(run: Run, patch: pytest.MonkeyPatch) -> None:
        layer = run.training.parallel.model.moe_modules()[0]
        start = layer.experts.start

        def planted(h_TD: Any, **options: Any) -> Any:
            h_TD, compute = start(h_TD, **options)

            def scaled(rows: Any, layout: Any) -> Any:
                counts = torch.tensor(layout.slot_counts)
                slot_Q = torch.arange(len(counts)).repeat_interleave(counts)
                return compute(replace(rows, weight_Q=torch.where(slot_Q == 1, factor, 1.0) * rows.weight_Q), layout)

            return h_TD, scaled

        patch.setattr(layer.experts, "start", planted)

    return plant


# Name -> (fault, kind of hint, words in its text)
FAULTS: dict[str, tuple[Callable[[Run, pytest.MonkeyPatch], None], str, str]] = {
    "healthy": (healthy, "", ""),
    "a source turns corrupt": (corrupt_source, "source/prose", "the loss of source prose "),
    "an output of zero": (scaled_output(0.0), "zero_output", "layer "),
}


@contextmanager
def built(engine: str, data: Path, root: Path) -> Iterator[Run]:
    with world_of_one(), built_run(ENGINES[engine](data, root, CHANGES)) as run:
        yield run


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, fault: str
) -> None:
    plant, kind, words = FAULTS[fault]
    with built(engine, tiny_data, tmp_path) as run:
        plant(run, monkeypatch)
        found = {each: text for each, text in hints(run).items() if each.partition("/")[0] in ("source", "zero_output")}
    assert [*found] == [kind] * bool(kind)
    assert words in found.get(kind, "")
