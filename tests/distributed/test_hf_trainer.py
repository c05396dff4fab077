"""transformers' Trainer with experts on several ranks by moe_dist: exact resume, and records of the routing."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_dist.errors import ConfigError
from moe_dist.monitor.sinks.jsonl import read_lines
from tests.support.tiny_hf import VOCAB, save, tiny_model
from tests.support.worlds import RankContext

EXPERTS, TOP_K, LAYERS, STEPS, LENGTH = 8, 3, 2, 4, 10


@contextmanager
def launched(rank: RankContext) -> Iterator[None]:
    """Gives Accelerate the environment of torchrun, and forgets its state afterwards."""
    from accelerate.state import AcceleratorState, GradientState

    names = {"RANK": rank.rank, "LOCAL_RANK": rank.rank, "WORLD_SIZE": rank.world_size, "MASTER_ADDR": "localhost"}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in names.items()}):
        yield
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def trained(rank: RankContext, out: Path, *, resume: Path | None = None, save_only_model: bool = False) -> Any:
    """Trains `STEPS` steps with a checkpoint after each second one. Returns the trainer."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    from transformers.distributed.configuration_utils import DistributedConfig

    from moe_dist.hf.ep.resume import ExactResume
    from moe_dist.monitor.attached.trainer import RecordRouting

    class ResumableTrainer(ExactResume, Trainer):
        pass

    parallel = DistributedConfig(fsdp_size=rank.world_size, ep_size=rank.world_size, ep_implementation="moe_dist")
    model = AutoModelForCausalLM.from_pretrained(rank.folder / "model", distributed_config=parallel)
    rows = torch.randint(0, VOCAB, (32, LENGTH), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        save_steps=2,
        save_only_model=save_only_model,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        log_level="error",
    )
    trainer = ResumableTrainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],  # pyright: ignore[reportArgumentType]
        callbacks=[RecordRouting(sinks=["jsonl"], trace_every=2)],
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def weights_of(trainer: Any) -> dict[str, Tensor]:
    state = trainer.model.state_dict()
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in state.items()}


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def resumed(rank: RankContext) -> dict[str, Any]:
    if rank.rank == 0:
        save(tiny_model("qwen3_moe"), rank.folder / "model")
    dist.barrier()
    with launched(rank):
        whole = trained(rank, rank.folder / "run")
        dist.barrier()  # rank 0 has written the last record
        lines = [*read_lines(rank.folder / "run" / "routing" / "metrics.jsonl")]
        dist.barrier()
        again = trained(rank, rank.folder / "run", resume=rank.folder / "run" / "checkpoint-2")
        dist.barrier()
        relogged = [*read_lines(rank.folder / "run" / "routing" / "metrics.jsonl")]
        trained(rank, rank.folder / "weights only", save_only_model=True)
        with pytest.raises(ConfigError) as refused:
            trained(rank, rank.folder / "x", resume=rank.folder / "weights only" / "checkpoint-2")
    kept, new = weights_of(whole), weights_of(again)
    return {
        "losses": (losses_of(whole), losses_of(again)),
        "different": [name for name, each in kept.items() if not torch.equal(each, new[name])],
        "lines": (lines, relogged),
        "refused": str(refused.value),
    }


def test_trainer_resumes_to_the_same_bits_and_is_recorded(run_in_world: Callable[..., list[Any]]) -> None:
    for found in run_in_world(2, resumed):
        whole, again = found["losses"]
        assert len(whole) == STEPS
        assert len(set(whole)) == STEPS
        assert again == whole
        assert found["different"] == []
        assert "weights only/checkpoint-2 has no sharded_model" in found["refused"]
        lines, relogged = found["lines"]
        assert [line["step"] for line in lines] == [line["step"] for line in relogged] == [1, 2, 3, 4]
        for line, other, loss in zip(lines, relogged, whole, strict=True):
            tokens = 2 * 2 * 2 * LENGTH  # ranks, micro-batches, rows
            assert line["arrays"]["tokens_LG"] == [[tokens]] * LAYERS
            assert [sum(each) for each in line["arrays"]["choices_LC"]] == [TOP_K * tokens] * LAYERS
            assert [len(each) for each in line["arrays"]["rows_LR"]] == [2] * LAYERS, "a row for each rank"
            assert line["arrays"] == other["arrays"], "a resumed run takes the same choices"
            assert line["scalars"]["loss/total"] == pytest.approx(loss)
