"""transformers' Trainer with moe_dist's expert parallelism resumes exactly, and its routing is recorded."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_dist.errors import ConfigError
from moe_dist.monitor.attached.attach import attach
from moe_dist.monitor.report.panels import nulls
from moe_dist.monitor.report.routing import Subject
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.monitor.trace.reader import read_trace
from tests.support.tiny_hf import HIDDEN_DIM, VOCAB, save, tiny_model
from tests.support.worlds import RankContext
from tools.report import open_routing

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


def with_absent_choices(forward: Callable[..., Any], *inputs: Any) -> tuple[Any, ...]:
    """Runs a router, and makes the last choice of every second token absent."""
    logits, weights, ids_TK = forward(*inputs)
    kept_TK = ids_TK.clone()
    kept_TK[::2, -1] = EXPERTS
    return logits, weights, kept_TK


def trained(rank: RankContext, out: Path, *, resume: Path | None = None, absent: bool = False, **changes: Any) -> Any:
    """Trains `STEPS` steps, with a checkpoint after every second step. Returns the trainer."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    from transformers.distributed.configuration_utils import DistributedConfig

    from moe_dist.hf.ep.resume import ExactResume
    from moe_dist.monitor.attached.trainer import RecordRouting

    class ResumableTrainer(ExactResume, Trainer):
        pass

    parallel = DistributedConfig(fsdp_size=rank.world_size, ep_size=rank.world_size, ep_implementation="moe_dist")
    model = AutoModelForCausalLM.from_pretrained(rank.folder / "model", distributed_config=parallel)
    if absent:
        for layer in model.model.layers:
            layer.mlp.gate.forward = partial(with_absent_choices, layer.mlp.gate.forward)
    rows = torch.randint(0, VOCAB, (32, LENGTH), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        str(out), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=STEPS, save_steps=2,
        logging_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, ddp_backend="gloo",
        dataloader_pin_memory=False, disable_tqdm=True, log_level="error", **changes,
    )  # fmt: skip
    trainer = ResumableTrainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],  # pyright: ignore[reportArgumentType]
        eval_dataset=[{"input_ids": row, "labels": row} for row in rows[:4]],  # pyright: ignore[reportArgumentType]
        callbacks=[RecordRouting(sinks=["jsonl"], trace_every=1)],
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def resumed(rank: RankContext) -> dict[str, Any]:
    if rank.rank == 0:
        save(tiny_model("qwen3_moe"), rank.folder / "model")
    dist.barrier()
    with launched(rank):
        whole = trained(rank, rank.folder / "run")
        dist.barrier()  # after this, rank 0 has written the last record
        lines = [*read_lines(rank.folder / "run" / "routing" / "metrics.jsonl")]
        dist.barrier()
        again = trained(rank, rank.folder / "run", resume=rank.folder / "run" / "checkpoint-2")
        dist.barrier()
        relogged = [*read_lines(rank.folder / "run" / "routing" / "metrics.jsonl")]
        costs = {"gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 1}
        trained(rank, rank.folder / "weights only", absent=True, save_only_model=True, **costs)
        with pytest.raises(ConfigError) as refused:
            trained(rank, rank.folder / "x", resume=rank.folder / "weights only" / "checkpoint-2")
    dist.barrier()
    check_traffic(rank.folder / "run" / "routing", exchanges=4, absent=0.0)
    # This run evaluates after each step. Recomputation sends dispatch's rows once more.
    check_traffic(rank.folder / "weights only" / "routing", exchanges=5, absent=1 / 6)
    return {"losses": (losses_of(whole), losses_of(again)), "lines": (lines, relogged), "refused": str(refused.value)}


def rows_of(step: Any) -> int:
    """Returns the number of distinct (token, other rank) pairs of a traced step. Each rank has half of the experts."""
    own_T = step.tokens["sequence"] % 2
    rank_TLK = np.where((step.ids < 0) | (step.ids >= EXPERTS), own_T[:, None, None], step.ids // (EXPERTS // 2))
    return int((rank_TLK != own_T[:, None, None]).any(2).sum())


def check_traffic(folder: Path, *, exchanges: int, absent: float) -> None:
    """Compares each step's record with the traced choices. Each row is sent in `exchanges` exchanges."""
    trace = read_trace(folder)
    shown = nulls(Subject(open_routing(folder), None, [], ()))
    assert ("16.7% of the choices in steps 1 to 4 are absent" in shown) == bool(absent)
    for line in read_lines(folder / "metrics.jsonl"):
        rows, scalars = rows_of(trace.step(line["step"])), line["scalars"]
        assert line["ledger"]["rows_remote"] == rows > 0
        assert scalars["comm/bytes_sent"] == line["ledger"]["payload_bytes"] == exchanges * rows * HIDDEN_DIM * 4
        assert line["ledger"]["pairs"] == np.sum(line["arrays"]["choices_LC"])
        assert scalars["moe/null_fraction/routed"] == pytest.approx(absent)
        work_LR = np.array(line["arrays"]["rows_LR"])
        even = (work_LR.max(1) / work_LR.mean(1)).mean()
        assert scalars["moe/balance_efficiency_by_count"] == pytest.approx(1 / even)
        assert scalars["comm/dedup_factor"] == pytest.approx(line["ledger"]["pairs_remote"] / rows)


@pytest.mark.slow
def test_trainer_resumes_to_the_same_losses_and_is_recorded(run_in_world: Callable[..., list[Any]]) -> None:
    for found in run_in_world(2, resumed):
        whole, again = found["losses"]
        assert len(whole) == STEPS
        assert len(set(whole)) == STEPS
        assert again == whole
        assert "weights only/checkpoint-2 has no sharded_model" in found["refused"]
        lines, relogged = found["lines"]
        assert [line["step"] for line in lines] == [line["step"] for line in relogged] == [1, 2, 3, 4]
        for line, other, loss in zip(lines, relogged, whole, strict=True):
            tokens = 2 * 2 * 2 * LENGTH  # ranks, micro-batches, sequences
            assert line["arrays"]["tokens_LG"] == [[tokens]] * LAYERS
            assert [sum(each) for each in line["arrays"]["choices_LC"]] == [TOP_K * tokens] * LAYERS
            assert [len(each) for each in line["arrays"]["rows_LR"]] == [2] * LAYERS, "a row for each rank"
            assert line["arrays"] == other["arrays"], "a resumed run takes the same choices"
            assert line["scalars"]["loss/total"] == pytest.approx(loss)


def recorded_with_tensor_parallelism(rank: RankContext) -> None:
    """Runs one forward of two TP ranks without a Trainer, because Accelerate refuses tensor parallelism on a CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    import moe_dist.hf.ep  # noqa: F401

    if rank.rank == 0:
        save(tiny_model("qwen3_moe"), rank.folder / "model")
    dist.barrier()
    with launched(rank):
        parallel = DistributedConfig(tp_size=2, ep_size=2, ep_implementation="moe_dist")
        model = AutoModelForCausalLM.from_pretrained(rank.folder / "model", distributed_config=parallel).train()
    tokens_BS = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCAB
    with attach(model, rank.folder / "run", sinks=["jsonl"], trace_every=1) as watch:
        model(input_ids=tokens_BS)
        record = watch.step()
    dist.barrier()
    assert len(read_trace(rank.folder / "run").step(1).tokens) == tokens_BS.numel()
    if record is not None:
        assert record.arrays["tokens_LG"].tolist() == [[tokens_BS.numel()]] * LAYERS
        assert record.ledger["pairs"] == record.arrays["choices_LC"].sum() == TOP_K * tokens_BS.numel() * LAYERS


def test_ranks_with_the_same_tokens_count_them_once(run_in_world: Callable[..., list[Any]]) -> None:
    run_in_world(2, recorded_with_tensor_parallelism)
