"""Each engine loads the other's checkpoints bit for bit, on any number of ranks."""

import gc
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import RankLayout
from moe_dist.formats.manifest import load_manifest
from moe_dist.hf.exporting import export_model
from moe_dist.train.start.resume import Resumable
from tests.support.cover import exhaustive, full
from tests.support.engine_run import megatron, ranks, started_run, take_steps
from tests.support.worlds import RankContext

pytestmark = pytest.mark.megatron
Run = Callable[..., list[Any]]
ONE, TWO, FOUR = ranks(1), ranks(2), ranks(2, 2)
BLOCK = {**FOUR, **megatron(tp=2, pp=2)}
INTERLEAVED = {**FOUR, **megatron(pp=2, vpp=2, distributed_optimizer=True)}
SHARDED = {**TWO, **megatron(distributed_optimizer=True)}
PINNED = {**TWO, "placement": {"policy": "pinned"}, **megatron(cp=2)}
# A model whose checkpoint has every kind of tensor: norms over all heads, tied embeddings, biases.
MODEL = {
    "model.qk_norm": "full",
    "model.attention_bias": "qkv",
    "model.tie_embeddings": True,
    "model.moe.router": {"kind": "top_k", "selection_bias": True},
    "model.moe.balance": [
        {"kind": "active_experts", "target": {"text": 1.2, "image": 0.8}, "rate": 0.05, "proportional": 0.1},
        {"kind": "loss_free", "rate": 0.01},
    ],
}


def legs(
    rank: RankContext, data: str, changes: Mapping[str, Any], source: str | None, steps: tuple[int, int], target: str
) -> list[float]:
    """Loads the checkpoint in `source`, takes the steps from `steps[0]` to `steps[1]` - 1, and saves to `target`."""
    with started_run(rank, data, changes) as run:
        mesh = run.mesh
        layout = RankLayout(run.placement, mesh.rank, mesh.world_size, mesh.ep_rank, mesh.edp_rank, mesh.edp_size)

        def manager(folder: str) -> CheckpointManager:
            return CheckpointManager(Path(folder), keep=1, lease_check=lambda: None, process_group=mesh.checkpoint)

        if source is not None:
            for parameter in run.parameters():
                parameter.data.fill_(float("nan"))  # a value that was not loaded stays NaN
            state, store = run.training.capture(layout), manager(source)
            newest = store.latest()
            restored = store.load(newest, state)
            run.training.loaded(state)
            for name, controller in run.training.controllers().items():
                saved: Any = restored.values["controllers"]
                controller.restore(saved[name])
        found = take_steps(run, *steps)
        states = {name: controller.state() for name, controller in run.training.controllers().items()}
        values = {"config": run.config.model_dump(mode="json"), "controllers": states}
        manager(target).save(steps[1], run.training.capture(layout, values=values))
        return [step["loss"] for step in found]


def fingerprints(folder: str) -> dict[str, Any]:
    """Returns everything that could differ between two checkpoints: the tensors' dtypes, shapes and fingerprints, the
    optimizer steps, and the controllers' states."""
    newest = next(each for each in Path(folder).iterdir() if each.is_dir())
    contents = open_checkpoint(newest)
    found: dict[str, Any] = {name: (e.dtype, e.shape, e.fingerprint) for name, e in contents.index.tensors.items()}
    return {**found, "steps": contents.state.optimizer_steps, "controllers": contents.state.values["controllers"]}


def exported_files(source: str, data: str) -> dict[str, bytes]:
    """Exports a checkpoint to Hugging Face's format, and returns the contents of its files by name."""
    out = Path(f"{source}_hf")
    export_model(Path(source), out, data=Path(data))
    return {each.name: each.read_bytes() for each in out.iterdir()}


@pytest.mark.parametrize(
    ("layout", "readers"),
    [full(BLOCK, ONE), exhaustive(INTERLEAVED, TWO), full(PINNED, ONE)],
    ids=["block", "interleaved", "pinned"],
)
def test_there_and_back_changes_no_bit(
    run_engine: Run, tiny_data: Path, tmp_path: Path, layout: dict[str, Any], readers: dict[str, Any]
) -> None:
    """`readers` is a layout of our engine that reads the same sequences per micro-batch as `layout`."""
    folders = [str(tmp_path / name) for name in ("own", "there", "back", "on", "resumed", "again")]
    own, there, back, on, resumed, again = folders
    run_engine({**ONE, **MODEL}, legs, None, (0, 3), own)
    run_engine({**layout, **MODEL}, legs, own, (3, 3), there)
    run_engine({**TWO, **MODEL}, legs, there, (3, 3), back)
    assert "layers.1.moe.router.text.bias" in fingerprints(own)
    assert fingerprints(there) == fingerprints(back) == fingerprints(own)
    expected = run_engine({**readers, **MODEL}, legs, own, (3, 6), on)[0]
    for found in run_engine({**layout, **MODEL}, legs, there, (3, 6), resumed):
        assert found == pytest.approx(expected, rel=1e-5)

    run_engine({**TWO, **MODEL}, legs, resumed, (6, 6), again)
    exported = [exported_files(folder, str(tiny_data)) for folder in (resumed, again)]
    assert exported[0] == exported[1]
    assert any(name.endswith(".safetensors") for name in exported[0])


def tensors_after_a_save(rank: RankContext, data: str, changes: Mapping[str, Any]) -> Counter[tuple[int, ...]]:
    """Returns the shapes of the tensors that a save leaves alive in this process. It leaves vectors out, because
    threads of the standing world create some; most gathered tensors are matrices."""

    def alive() -> Counter[tuple[int, ...]]:
        gc.collect()
        tensors = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
        return Counter(tuple(each.shape) for each in tensors if each.ndim > 1)

    with started_run(rank, data, changes) as run:
        take_steps(run, 0, 1)  # makes the moments
        mesh = run.mesh
        store = CheckpointManager(rank.folder / "saved", keep=1, lease_check=lambda: None, process_group=mesh.checkpoint)
        before = alive()
        store.save(1, run.training.capture(RankLayout(run.placement, mesh.rank, mesh.world_size, mesh.ep_rank)))
        return alive() - before


@pytest.mark.full
def test_a_save_keeps_no_gathered_tensor(run_engine: Run) -> None:
    assert not any(run_engine(SHARDED, tensors_after_a_save))


def begun(rank: RankContext, data: str, changes: Mapping[str, Any]) -> float:
    """Returns the loss of the first step of a run that began with weights of another run."""
    with started_run(rank, data, changes) as run:
        mesh, folder = run.mesh, rank.folder / "new"
        store = CheckpointManager(folder, keep=1, lease_check=lambda: None, process_group=mesh.checkpoint)
        Resumable(run.training, run.placement, store, run.config, load_manifest(data)).restore()
        return take_steps(run, 0, 1)[0]["loss"]


@pytest.mark.full
def test_a_run_begins_with_weights_of_the_other_engine(run_engine: Run, tmp_path: Path) -> None:
    source, seed = str(tmp_path / "own"), {"run.seed": 5}
    run_engine(ONE, legs, None, (0, 3), source)
    changes = {**seed, "run.init_from": f"{source}/step_3"}
    (new,), (expected,) = (run_engine({**ONE, **each}, begun) for each in (seed, changes))
    assert abs(new - expected) > 0.1
    for layout in ({**TWO, **megatron(tp=2)}, {**TWO, **megatron(cp=2, distributed_optimizer=True)}):
        assert run_engine({**layout, **changes}, begun) == pytest.approx([expected] * 2, rel=1e-5)
