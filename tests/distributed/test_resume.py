"""A resumed run is bit-equal to the run that never stopped, for each kind of state, and training continues while a save
is in flight. test_checkpoint.py loads checkpoints of other layouts."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moe_dist.checkpoint import manager as manager_module
from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.saver import CheckpointWriter
from moe_dist.checkpoint.state import capture
from moe_dist.train.build.training import rank_layout
from moe_dist.train.objective.loss import AuxSettings
from tests.support.cover import exhaustive, full
from tests.support.engine_run import megatron
from tests.support.layouts import MICRO_BATCHES, SEQUENCES, Layout, TrainingRank, batch_of
from tests.support.tiny import IMAGE_IDS, tiny_config
from tests.support.tuning_samples import made_samples
from tests.support.whole_run import WholeRun, whole_run
from tests.support.worlds import RankContext

STEPS, STOP = 5, 3  # STOP is no multiple of the intervals of refreshes and levers, so that the run stops between them
RUN = {
    "train.steps": STEPS,
    "checkpoint.every": STOP,
    "evaluation.every": 100,
    "evaluation.final_sequences": 4,
    "placement.policy": "interleaved",
}
ONE_RANK = {"parallel.ep": 1, "train.micro_batch": 8}


def groups(**group: int) -> dict[str, Any]:
    """Returns equal settings for both groups, so that every rank has experts of both groups."""
    return {"model.moe.groups": {name: {"ffn_dim": 16, **group} for name in ("text", "image")}}


def router(kind: str, **fields: Any) -> dict[str, Any]:
    return {"model.moe.router": {"kind": kind, **fields}}


CONTROLLERS = {
    "model.moe.balance": [
        {"kind": "active_experts", "target": {"text": 1.2}, "rate": 0.5, "proportional": 0.1, "decay_steps": 4},
        {"kind": "loss_free", "rate": 0.01},
    ],
}
NO_BALANCE = {"loss.balance.schedule": [[0, 0.0]]}
CHOICE = {
    **groups(num_experts=2, top_k=1),
    **router("expert_choice", causal="threshold", noise=1.0, threshold_decay=0.7, capacity_schedule=[[0, 1], [4, 0.5]]),
    **NO_BALANCE,
}
NULLS = groups(num_experts=4, num_null=2, top_k=3)
ADAPTIVE = {
    **groups(num_experts=3, num_null=1, num_identity=1, top_k=3),
    "model.moe.balance": CONTROLLERS["model.moe.balance"][:1],
}
LEVERS = {**groups(num_experts=6, num_null=2, top_k=2), "train.global_batch": 16}
DENSE = {"model.moe.groups": {"all": {"num_experts": 1, "top_k": 1, "ffn_dim": 16, "modalities": ["text", "image"]}}}
ADAPTERS = {
    "model.moe.groups": {
        "all": {"num_experts": 3, "num_null": 1, "top_k": 2, "ffn_dim": 16, "modalities": ["text", "image"]}
    },
    "model.moe.experts": {"kind": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.1},
    **router("top_k", normalise="none"),
    "model.attention_lora": {"rank": 2, "alpha": 4.0, "dropout": 0.1},
    "train.only": "adapters",
    "run.init_rules": ["adapt"],
}
TUNED = {"train.only": "routers", "train.global_batch": 4, "train.micro_batch": 1, **NO_BALANCE}


class Kind(NamedTuple):
    """A run that has state of some kind.

    Attributes:
        changes: Changes of the run's configuration.
        ranks: Number of ranks.
        base: Changes of the configuration of another run, whose weights this run starts with; None for initial weights.
        tuning: The section `router_tuning`, without the folder of its samples; None without router tuning.
    """

    changes: Mapping[str, Any]
    ranks: int = 2
    base: Mapping[str, Any] | None = None
    tuning: Mapping[str, Any] | None = None


KINDS = {
    # State: controllers' biases and last errors, and loads for the next step's balance loss. Saves are asynchronous.
    "controllers": Kind({
        **NULLS, **router("top_k", selection_bias=True), **CONTROLLERS, "loss.balance.scope": "step", "loss.z": 1e-3,
        "parallel.data": "fsdp2", "checkpoint.asynchronous": True,
    }),
    "thresholds, noise and capacities of expert choice": Kind(CHOICE),
    "thresholds of mixture of depths": Kind({"model.mixture_of_depths": {"capacity": 0.5}, "evaluation.calibration": 2}),
    "warm-up of expert threshold": Kind({
        **CHOICE, **router("expert_threshold", warmup_steps=4, threshold_decay=0.7, capacity_schedule=[[0, 1], [4, 0.5]]),
    }),
    "top_p": Kind({**ADAPTIVE, **router("top_p"), **ONE_RANK}, 1),
    "relu": Kind({**ADAPTIVE, **router("relu"), **ONE_RANK}, 1),
    "threshold": Kind({**ADAPTIVE, **router("threshold"), **ONE_RANK}, 1),
    "predicted_k": Kind({**ADAPTIVE, **router("predicted_k"), **ONE_RANK}, 1),
    "gating_residual": Kind({**NULLS, **CONTROLLERS, **router("gating_residual", selection_bias=True), **ONE_RANK}, 1),
    "group_limited": Kind({**NULLS, **CONTROLLERS, **router("group_limited", n_group=2), **ONE_RANK}, 1),
    "bf16": Kind({"parallel.precision": "bf16"}),
    "muon": Kind({"optimizer.kind": "muon", "parallel.data": "fsdp2"}),
    "dropout of adapters": Kind(ADAPTERS, base=DENSE),
    "routing of samples, refreshed": Kind({**TUNED, "parallel.recompute": "block"}, base={}, tuning={"refresh_every": 2}),
    "choices of samples": Kind({**TUNED, "parallel.data": "fsdp2"}, base={}, tuning={"objective": "choices"}),
    "dealt sequences and moved experts": Kind({
        **LEVERS, "rank_balance": {"dealing": True, "moving": {"every": 2, "flops_per_byte": 1e-3}},
    }),
    "replicas of experts": Kind({
        **LEVERS, "rank_balance": {"replicating": {"every": 2, "slots": 4, "flops_per_byte": 1e-3}},
    }),
    "Megatron-Core": Kind({
        **NULLS, **router("top_k", selection_bias=True), **CONTROLLERS, **megatron(distributed_optimizer=True),
        "parallel.precision": "bf16",
    }),
    "Megatron-Core in blocks": Kind({**NULLS, **megatron(tp=2, pp=2), "parallel.edp": 2, "model.num_layers": 4}, 4),
    "two copies under FSDP2": Kind({"parallel.ep": 1, "parallel.edp": 2, "parallel.data": "fsdp2"}),
    "a rank without experts": Kind({"parallel.ep": 4, "placement.policy": "pinned", "train.micro_batch": 1}, 4),
}  # fmt: skip
ALWAYS = ("controllers", "dealt sequences and moved experts")
RARE = ("Megatron-Core in blocks", "two copies under FSDP2", "a rank without experts")


def marked(kind: str) -> Any:
    return kind if kind in ALWAYS else exhaustive(kind) if kind in RARE else full(kind)


def numbers(runs: list[WholeRun]) -> list[list[tuple[Any, ...]]]:
    """Returns losses, gradient norm, choices and sent bytes of each rank and step."""
    return [
        [
            (each.nll_M.tolist(), each.balance, each.z, each.auxiliary, each.grad_norm,
             each.counts.choices_LC.tolist(), dict(each.ledger))
            for each in run.steps
        ]
        for run in runs
    ]  # fmt: skip


def saved(folder: Path) -> dict[str, Any]:
    """Returns everything in which two checkpoints could differ: dtype, shape and fingerprint of each tensor, the
    optimizer's steps, the states of controllers and levers, and the counters."""
    contents = open_checkpoint(folder / "checkpoints" / f"step_{STEPS}")
    found: dict[str, Any] = {name: (e.dtype, e.shape, e.fingerprint) for name, e in contents.index.tensors.items()}
    values = {name: contents.state.values[name] for name in ("progress", "controllers", "levers", "data")}
    return {**found, "steps": contents.state.optimizer_steps, **values}


@pytest.mark.parametrize("kind", [marked(kind) for kind in KINDS])
@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, kind: str
) -> None:
    changes, ranks, base, tuning = KINDS[kind]
    changes = {**RUN, **changes}
    if base is not None:
        run_in_world(1, whole_run, tiny_data, tmp_path, {**RUN, **ONE_RANK, **base, "run.name": "base", "train.steps": 2})
        changes["run.init_from"] = str(tmp_path / "base")
    if tuning is not None:
        model = tiny_config(tiny_data, tmp_path).model.model_dump(mode="json")
        options: dict[str, Any] = {"base": tmp_path / "base", "layers": (0, 1), "columns": 8, "model": model}
        samples = made_samples(tmp_path / "samples", ids=(4, IMAGE_IDS[1]), **options)
        changes["router_tuning"] = {"data": str(samples), "last_layers": 1, **tuning}

    def run(name: str, steps: int) -> list[WholeRun]:
        return run_in_world(ranks, whole_run, tiny_data, tmp_path, {**changes, "run.name": name, "train.steps": steps})

    whole = run("whole", STEPS)
    before = run("stopped", STOP)
    after = run("stopped", STEPS)
    assert all(each.begun.step == STOP for each in after)
    expected = numbers(whole)
    assert [one + other for one, other in zip(numbers(before), numbers(after), strict=True)] == expected
    assert all(len({str(each[0]) for each in steps}) == STEPS for steps in expected), "every step changes the loss"
    for ours, theirs in zip(after, whole, strict=True):
        torch.testing.assert_close(ours.tensors, theirs.tensors, rtol=0, atol=0)
        assert ours.evaluation.loss == theirs.evaluation.loss
        assert ours.evaluation.choice_loss == theirs.evaluation.choice_loss
    assert saved(tmp_path / "stopped") == saved(tmp_path / "whole")


AUX = AuxSettings(kind="null_averaged", balance=0.02, z=1e-3)


class Resumed(TrainingRank):
    """One rank of a training run that saves during training, and may start from a checkpoint."""

    def __init__(self, rank: RankContext, layout: Layout, folder: Path) -> None:
        super().__init__(layout)
        self.rank = rank
        self.manager = CheckpointManager(folder, keep=2, lease_check=lambda: None, process_group=self.mesh.checkpoint)

    def state(self) -> Any:
        return capture(self.parallel.model, self.optimizer, rank_layout(self.placement, self.mesh))

    def train(self, first: int, last: int) -> list[tuple[float, ...]]:
        """Returns the losses by modality and the gradient norm of each step."""
        each, seen = SEQUENCES // self.rank.world_size, []
        for number in range(first, last):
            batches = [batch_of(number, micro, self.rank.rank * each, each) for micro in range(MICRO_BATCHES)]
            result = self.step(batches, lr=1e-2, aux=AUX)
            seen.append((*result.nll_M.tolist(), result.grad_norm))
        return seen


def in_flight_body(rank: RankContext, folder: Path) -> dict[str, Any]:
    """Delays rank 1's write while all ranks take steps. A second run at the same step must wait for this save."""
    layout = Layout(2, 1, "pinned", precision="float32")
    go, begun, real = threading.Event(), threading.Event(), manager_module.write_shard

    def held(*args: Any, **kwargs: Any) -> None:
        begun.set()
        if rank.rank == 1:
            assert go.wait(600)
        real(*args, **kwargs)

    twin = Resumed(rank, layout, folder / "twin")
    expected = twin.train(0, 3)
    twin.manager.save(3, twin.state())
    expected += twin.train(3, 6)
    run = Resumed(rank, layout, folder / "run")
    seen = run.train(0, 3)
    saver = CheckpointWriter(run.manager, asynchronous=True)
    manager_module.write_shard = held
    try:
        saver.write(3, run.state(), durable=False)
        assert begun.wait(600)
        seen += run.train(3, 6)  # trains while the collectives of the save wait for rank 1
        told = {"in flight": saver.in_flight, "committed": (folder / "run" / "step_3").exists()}
        go.set()
        saver.wait()
    finally:
        manager_module.write_shard = real
    return {**told, "same": seen == expected, "latest": str(run.manager.latest())}


def test_training_goes_on_while_a_save_is_in_flight(run_in_world: Callable[..., list[Any]], tmp_path: Path) -> None:
    for told in run_in_world(2, in_flight_body, tmp_path):
        assert told == {"in flight": True, "committed": False, "same": True, "latest": str(tmp_path / "run" / "step_3")}
    ours, theirs = (open_checkpoint(tmp_path / name / "step_3").index.tensors for name in ("run", "twin"))
    assert ours == theirs
