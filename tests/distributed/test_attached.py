"""Tests `attach` on several ranks, for Megatron-Core's MoE layers, and for a transformers model with counts that are summed
over ranks."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_dist.errors import ConfigError
from moe_dist.monitor import attach
from moe_dist.monitor.attached import folder as attached_folder
from moe_dist.monitor.trace.reader import read_trace
from tests.support.cover import exhaustive, full
from tests.support.megatron_model import (
    MOE_LAYERS,
    ONE_GROUP,
    SEQ_LEN,
    VOCAB_SIZE,
    Layout,
    causal_mask,
    gpt_model,
    transformer_config,
)
from tests.support.megatron_run import megatron
from tests.support.tiny_hf import VOCAB, tiny_model
from tests.support.worlds import RankContext

EXPERTS, TOP_K, STEPS = 8, 2, 2
# Options of Megatron's TransformerConfig that change its router.
VARIANTS: dict[str, dict[str, Any]] = {
    "aux loss": {"moe_router_load_balancing_type": "aux_loss"},
    "sigmoid, recompute": {
        "moe_router_score_function": "sigmoid", "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None, "recompute_granularity": "selective", "recompute_modules": ["moe"],
    },
}  # fmt: skip


@contextmanager
def router_outputs() -> Iterator[list[tuple[int, np.ndarray, np.ndarray]]]:
    """Yields the list of (layer number, weights, map) of each call of Megatron's router, except calls by recompute. The
    tests use it as the oracle."""
    from megatron.core.tensor_parallel.random import CheckpointFunction
    from megatron.core.transformer.moe.router import TopKRouter

    seen: list[tuple[int, np.ndarray, np.ndarray]] = []
    routing, backward, recomputing = TopKRouter.routing, CheckpointFunction.backward, []

    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        probs, chosen = routing(self, *arguments, **options)
        if self.training and not recomputing:
            seen.append((self.layer_number, probs.detach().numpy().copy(), chosen.numpy().copy()))
        return probs, chosen

    def during(*arguments: Any) -> Any:
        recomputing.append(True)
        try:
            return backward(*arguments)
        finally:
            recomputing.pop()

    with mock.patch.object(TopKRouter, "routing", noted), mock.patch.object(CheckpointFunction, "backward", during):
        yield seen


def stock_model(layout: Layout) -> Any:
    """Returns Megatron's GPTModel with Megatron's own MoELayer."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    config = transformer_config(layout)
    return gpt_model(config, get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"))


def trained(model: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(SEQ_LEN).expand(tokens_BS.shape)
    loss = model(tokens_BS, positions, causal_mask(), labels=tokens_BS).mean()
    loss.backward()
    return loss.detach()


def watched_megatron(rank: RankContext, ep: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains without and then with `attach`. Returns the oracle's counts on this rank, and rank 0's records."""
    layout, found = Layout(ep=ep, values=ONE_GROUP, options=options), []
    with megatron(layout):
        gradients: list[Any] = []
        losses: list[torch.Tensor] = []
        for watches in (False, True):
            torch.manual_seed(7)
            model = stock_model(layout).train()
            generator = torch.Generator().manual_seed(rank.rank)
            # two micro-batches in each step
            batches = torch.randint(0, VOCAB_SIZE, (STEPS, 2, 2, SEQ_LEN), generator=generator)
            if not watches:
                losses = [trained(model, tokens) for tokens in batches.flatten(0, 1)]
                gradients = [parameter.grad for parameter in model.parameters()]
                continue
            with attach(model, rank.folder, sinks=["jsonl"], trace_every=1, trace_tokens=None) as watch:
                for step in batches:
                    with router_outputs() as seen:
                        got = [trained(model, tokens) for tokens in step]
                        model.eval()
                        with torch.no_grad():
                            model(step[0], torch.arange(SEQ_LEN).expand(2, -1), causal_mask())
                        model.train()
                    assert torch.equal(torch.stack(got), torch.stack(losses[:2])), "attach changes the loss"
                    losses = losses[2:]
                    record = watch.step(got[-1])
                    counts = np.stack(
                        [sum(chosen.sum(0) for n, _, chosen in seen if n == layer + 1) for layer in MOE_LAYERS]
                    )
                    arrays = {} if record is None else {name: array.tolist() for name, array in record.arrays.items()}
                    found.append({"counts": counts, "seen": seen, "arrays": arrays, "tokens": step.numpy()})
            for parameter, expected in zip(model.parameters(), gradients, strict=True):
                assert (parameter.grad is None) == (expected is None)
                assert expected is None or torch.equal(parameter.grad, expected), "attach changes a gradient"  # pyright: ignore
    if rank.rank == 0:
        trace = read_trace(rank.folder)
        for step, each in zip(trace.steps, found, strict=True):
            each["traced"] = trace.step(step)
    return found


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("variant", "ep"), [full("sigmoid, recompute", 2), full("aux loss", 2), exhaustive("sigmoid, recompute", 1)]
)
def test_counts_of_megatrons_own_router(run_in_world: Callable[..., list[Any]], ep: int, variant: str) -> None:
    results = run_in_world(2, watched_megatron, ep, VARIANTS[variant])
    for step, each in enumerate(results[0]):
        total = np.sum([ranks[step]["counts"] for ranks in results], axis=0)
        assert each["arrays"]["choices_LC"] == total.tolist()
        assert each["arrays"]["tokens_LG"] == [[2 * 2 * 2 * SEQ_LEN]] * len(MOE_LAYERS)
        assert np.array(each["arrays"]["rows_LR"]).shape == (len(MOE_LAYERS), ep)
        trace = each["traced"]
        assert trace.manifest.layers == MOE_LAYERS
        assert np.array_equal(trace.choices(), total)
        rows = 0
        for ranks in results:  # this rank's tokens in the router's order, for both micro-batches
            for micro in range(2):
                calls = [ranks[step]["seen"][micro * len(MOE_LAYERS) + at] for at in range(len(MOE_LAYERS))]
                part = slice(rows, rows + 2 * SEQ_LEN)
                for at, (number, probs, chosen) in enumerate(calls):
                    assert number == MOE_LAYERS[at] + 1
                    ids = trace.ids[part, at]
                    assert np.array_equal(np.sort(ids), np.nonzero(chosen)[1].reshape(-1, TOP_K))
                    assert np.allclose(trace.weights[part, at], np.take_along_axis(probs, ids.astype(int), 1), atol=1e-3)
                assert np.array_equal(trace.tokens["token"][part], ranks[step]["tokens"][micro].T.ravel())
                rows += 2 * SEQ_LEN
        assert rows == len(trace.tokens)
        assert len(np.unique(trace.tokens[["sequence", "position"]])) == rows


def dropping(rank: RankContext) -> str:
    options = {"moe_expert_capacity_factor": 1.0, "moe_router_load_balancing_type": "aux_loss"}
    layout = Layout(values=ONE_GROUP, options=options)
    with megatron(layout), pytest.raises(ConfigError) as refused:
        attach(stock_model(layout), rank.folder)
    return str(refused.value)


@pytest.mark.megatron
@pytest.mark.slow
def test_a_capacity_of_megatron_is_refused(run_in_world: Callable[..., list[Any]]) -> None:
    (message,) = run_in_world(1, dropping)
    assert "decoder.layers.1.mlp.router, moe_expert_capacity_factor=1" in message


def summed(rank: RankContext) -> dict[str, Any]:
    """Returns a record with counts summed over ranks with different numbers of tokens, the collectives of one step, and the
    errors that all ranks raise."""
    model = tiny_model("mixtral").train()
    tokens = torch.randint(0, VOCAB, (1 + rank.rank, 5), generator=torch.Generator().manual_seed(rank.rank))
    with attach(model, rank.folder / "a", sinks=["jsonl"], trace_every=1) as watch:
        output = model(tokens, output_router_logits=True)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            record = watch.step(float(rank.rank))
    sharded = tiny_model("mixtral").train()
    for layer in sharded.model.layers:  # pyright: ignore
        fully_shard(layer.mlp.gate)
        fully_shard(layer)
    fully_shard(sharded)
    wrapped = {}
    for name, each in (("fsdp", sharded), ("ddp", DistributedDataParallel(tiny_model("mixtral").train()))):
        with attach(each, rank.folder / name, sinks=["jsonl"], trace_every=0) as watch:
            each(tokens).logits.sum().backward()
            norm: Any = torch.nn.utils.clip_grad_norm_(each.parameters(), 1.0)
            one = watch.step(grad_norm=norm)
            assert one is None or one.scalars["optim/grad_norm"] == (norm.full_tensor() if name == "fsdp" else norm).item()
            wrapped[name] = one and one.arrays["choices_LC"]
    counts = [np.bincount(logits.topk(2).indices.flatten(), minlength=EXPERTS) for logits in output.router_logits]
    with pytest.raises(ConfigError) as unopened:
        attach(model, rank.folder / "a")
    with pytest.raises(ConfigError) as different:
        attach(tiny_model("mixtral", num_local_experts=4 + rank.rank), rank.folder / "b")
    return {
        "counts": np.stack(counts),
        "reduced": reduced.call_count,
        "loss": record and record.scalars["loss/total"],
        "choices": record and record.arrays["choices_LC"],
        "wrapped": wrapped,
        "errors": (str(unopened.value), str(different.value)),
        "traced": len(read_trace(rank.folder / "a").step(1).tokens) if rank.rank == 0 else None,
    }


def test_a_record_sums_over_the_ranks(run_in_world: Callable[..., list[Any]]) -> None:
    first, second = run_in_world(2, summed)
    assert np.array_equal(first["choices"], first["counts"] + second["counts"])
    for choices in first["wrapped"].values():
        assert np.array_equal(choices, first["choices"])
    assert (first["loss"], second["loss"]) == (0.5, None)
    assert (first["reduced"], second["reduced"]) == (1, 1)
    assert first["traced"] == 15
    assert "has records up to step 1" in first["errors"][0]
    assert "another rank cannot use it" in second["errors"][0]
    assert "ranks have routers of different layers" in first["errors"][1]
    assert "ranks have routers of different layers" in second["errors"][1]


def unwritable(rank: RankContext, failing: int, target: str) -> str:
    """Calls `attach` while the disk of rank `failing` is full, so that the function `target` raises there. Each rank
    has its own disk. Returns the error."""
    folder = rank.folder / f"disk_{rank.rank}"
    full = mock.patch(target, side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with full if rank.rank == failing else nullcontext(), pytest.raises(ConfigError) as found:
        attach(tiny_model("mixtral"), folder, sinks=["jsonl"])
    attach(tiny_model("mixtral"), folder, sinks=["jsonl"]).detach()  # now the disk has space, and the same folder works
    return str(found.value)


@pytest.mark.parametrize(
    ("failing", "target"),
    [(0, "moe_dist.monitor.trace.format.Manifest.to_json"), (1, "moe_dist.monitor.attached.folder.TraceWriter")],
)
def test_an_error_of_one_rank_is_an_error_of_all(run_in_world: Callable[..., list[Any]], failing: int, target: str) -> None:
    messages = run_in_world(2, unwritable, failing, target)
    assert "No space left on device" in messages[failing]
    assert "give a new folder that can be written" in messages[failing]
    assert "another rank cannot use it" in messages[1 - failing]


def test_a_folder_takes_one_of_two_groups(tmp_path: Path) -> None:
    """The second group looked for a free folder before the first group created the folder."""
    attach(tiny_model("mixtral"), tmp_path, sinks=["jsonl"]).detach()
    (place,) = (tmp_path / "trace").iterdir()
    taken = int(place.name.rpartition("_")[2])
    wanted = r"was taken by another group.*give each group a folder of its own"
    with mock.patch.object(attached_folder, "_next_attempt", return_value=taken), pytest.raises(ConfigError, match=wanted):
        attach(tiny_model("mixtral"), tmp_path, sinks=["jsonl"])
