"""Watches the routers of a model that another trainer trains. Makes records, pictures and traces like a moe_dist run.

    with attach(model, "runs/mixtral") as watch:
        for batch in batches:
            ...                       # forwards, backwards, optimizer.step()
            watch.step(loss)

Forward hooks on the routers count the choices that the routers return. They change neither values nor gradients. Shape
letters are as in `routers.py`.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_dist.errors import ConfigError
from moe_dist.moe.dispatch.ledger import ModuleTraffic, compare
from moe_dist.moe.routing.counts import RoutingCounts, SentCounts
from moe_dist.monitor.attached.folder import open_together
from moe_dist.monitor.attached.routers import EXTRA, GUIDE, Counts, RouterHook, Routers, find_routers
from moe_dist.monitor.metrics import Record, comm_scalars, ratio, routing_arrays, routing_scalars
from moe_dist.monitor.pictures import Subject
from moe_dist.monitor.routing_hints import Hint
from moe_dist.monitor.sinks.sink import Sink
from moe_dist.monitor.tags import tag_plan
from moe_dist.monitor.trace.foreign import routed_group
from moe_dist.monitor.trace.format import Manifest
from moe_dist.placement.placement import ExpertPlacement

GIVEN = 4  # this many numbers follow the summed counts: loss, gradient norm, and for each the number of ranks that pass it

NO_TOKEN = "attach counted no token in this step: "
# Whether the routers are in training mode -> the cause of a step without tokens.
NO_TOKEN_CAUSES = {
    True: "no forward of the attached model ran, or none with its hooks, as in a copy of the model, an exported model or a "
    "captured CUDA graph; attach to the model that runs, and before it is captured",
    False: "the model is in evaluation mode, and only passes in training mode count; call model.train(), or give "
    "attach(..., eval_mode=True)",
}
# Tags whose values are known only if moe_dist sends the rows (`moe_dist.hf.ep`); the seconds are never known.
UNKNOWN_COSTS = (
    "comm/bytes_sent", "comm/bytes_saved_vs_topk", "comm/bytes_saved_vs_same_active", "comm/dedup_factor", "comm/seconds",
)  # fmt: skip


class Attached:
    """Watches the routers of `model` until `detach`, which the end of a `with` block calls. With several ranks the
    constructor is collective (two small all-reduces). It raises ConfigError in these cases: the model has no known routers
    or is already watched; the folder has records of another model or training; a sink cannot be opened; another process
    group took the folder at the same time; the ranks' models differ; another rank failed.

    Args:
        model: A model of transformers or Megatron-Core with routers in `ROUTERS`. It may be wrapped (DDP, FSDP2).
        sinks: Names in `folder.SINKS`, or sinks that the caller made. Only rank 0 uses sinks.
        pictures_every: Number of steps from one set of heat maps in TensorBoard to the next.
        trace_every: Number of steps from one traced step to the next; the first step is traced. 0 for no trace.
        trace_tokens: Largest number of tokens that a rank traces in a step; None for all tokens.
        eval_mode: Whether forward passes in evaluation mode count, too.
        tokenizer: Path of a tokenizer.json. The report takes the names of the tokens from it.
        last_step: If training resumes, the last step before this call, else 0. Later records in `folder` are dropped.
        group: Process group of the ranks that have the same layers and route different tokens; by default all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path,
        *,
        sinks: Sequence[str | Sink] = ("hints", "jsonl", "tensorboard"),
        pictures_every: int = 100,
        trace_every: int = 100,
        trace_tokens: int | None = 4096,
        eval_mode: bool = False,
        tokenizer: str | Path | None = None,
        last_step: int = 0,
        group: dist.ProcessGroup | None = None,  # pyright: ignore[reportPrivateImportUsage]
    ) -> None:
        if min(trace_every, last_step) < 0 or pictures_every < 1 or (trace_tokens is not None and trace_tokens < 1):
            raise ConfigError(
                f"attach: pictures_every={pictures_every}, trace_every={trace_every}, trace_tokens={trace_tokens}, "
                f"last_step={last_step}: none may be negative, nor the first and third 0; give larger numbers",
                see=GUIDE,
            )
        mesh = getattr(model, "_device_mesh", None)  # of a transformers model
        # Tensor parallelism gives ranks the same tokens: the first of them counts.
        most = 0 if group is None and mesh is not None and mesh.get_local_rank("tp") else None
        self._group = group = dist.group.WORLD if group is None and dist.is_initialized() else group
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        routers, self._step, self._tokens, self._told = find_routers(model), last_step, 0, False
        routed = routed_group(routers.num_experts, routers.top_k)
        named = (getattr(module, "traffic", None) for module in model.modules())
        self._traffic = [each for each in named if isinstance(each, ModuleTraffic)]
        self._placement = ExpertPlacement.interleaved([routed], routers.ranks)
        if self._traffic:
            self._placement = ExpertPlacement((routed,), self._traffic[0].slots)
        self._own_ledger()  # forgets the passes before this call
        manifest = Manifest(
            attempt=1,
            from_step=last_step,
            ranks=ranks,
            layers=routers.layers,
            choices=routers.top_k,
            weights=True,
            groups=self._placement.groups,
            rank_of_expert=self._placement.rank_of_expert,
            modalities=self._placement.groups[0].modalities,
            every=trace_every,
            tokens=trace_tokens,
            tokenizer=None if tokenizer is None else str(Path(tokenizer).absolute()),
            configuration=_configuration(model, routers),
        )
        subject = Subject(self._placement.groups, self._placement, routers.layers, num_modalities=1)
        self._writer, self._sinks = open_together(
            Path(folder),
            sinks,
            subject,
            manifest,
            sequence_first=routers.kind.sequence_first,
            pictures_every=pictures_every,
            rank=rank,
            group=group,
            device=routers.device,
        )
        counts = self._counts = Counts(routers, eval_mode=eval_mode)
        self._handles = [
            model.register_forward_pre_hook(counts.see, with_kwargs=True),
            model.register_forward_hook(counts.forget, always_call=True),
            *(  # prepended, to run before FSDP2 reshards the router's weight and before another hook replaces the output
                router.register_forward_hook(RouterHook(counts, routers.kind, layer, most), prepend=True)
                for layer, router in enumerate(routers.modules)
            ),
        ]
        _drop_compiled()
        self._prepare()

    def step(
        self, loss: Tensor | float | None = None, *, lr: float | None = None, grad_norm: Tensor | float | None = None
    ) -> Record | None:
        """Records one optimizer step, with all forward passes since the last call. All ranks of the group must call it
        together.

        One all-reduce sums L x (E + 2) + 4 numbers over the ranks, and the ledger if moe_dist sends the rows. The host
        waits for the device once; in a traced step it also waits for the choices of experts. A DTensor, such as FSDP2's
        gradient norm, costs one more all-reduce.

        Args:
            loss, grad_norm: Values on this rank. The record has their means over those ranks that pass a value.

        Returns:
            On rank 0 the record of the step, on other ranks None.
        """
        self._step += 1
        sums_LX, parts = self._counts.take()
        own = self._own_ledger()
        values = torch.cat([sums_LX.flatten(), sums_LX.new_tensor([*own.values()]), sums_LX.new_zeros(GIVEN)])
        for at, number in ((-4, loss), (-2, grad_norm)):
            if number is not None:
                number = number.full_tensor() if isinstance(number, DTensor) else number
                values[at], values[at + 1] = number.detach() if isinstance(number, Tensor) else number, 1.0
        if self._group is not None:
            dist.all_reduce(values, group=self._group)
        host = values.cpu().numpy()  # in a step without trace this is the only host sync
        if self._counts.keep and self._writer is not None:
            self._writer.write(self._step, parts)
        record = None
        if self._sinks is not None:
            mean_loss, mean_norm = (float(total / ranks) if ranks else None for total, ranks in host[-GIVEN:].reshape(2, 2))
            counts, totals = np.split(host[:-GIVEN], [sums_LX.numel()])
            ledger = {key: round(total) for key, total in zip(own, totals.tolist(), strict=True)}
            record = self._record(counts.reshape(sums_LX.shape), ledger, mean_loss, mean_norm, lr)
            self._sinks.step(record)
            if not counts.any() and not self._told:
                self._told = True
                self._sinks.hint(Hint("tokens", NO_TOKEN + NO_TOKEN_CAUSES[self._counts.on]), self._step)
        self._prepare()
        return record

    def detach(self) -> None:
        """Removes the hooks and closes the files. Further calls do nothing."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _drop_compiled()
        self._handles.clear()
        if self._writer is not None:
            self._writer.close()
        if self._sinks is not None:
            self._sinks.close()
        self._sinks = None

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _prepare(self) -> None:
        self._began = time.perf_counter()
        self._counts.keep = self._writer is not None and self._writer.due(self._step + 1)

    def _own_ledger(self) -> Mapping[str, float]:
        """Returns this rank's ledger of the step, summed over layers; {} if moe_dist does not send the rows."""
        if not self._traffic:
            return {}
        taken = [each.take_counts() for each in self._traffic]
        rows, pairs, pairs_remote, tokens, choices, payload, metadata = map(sum, zip(*taken, strict=True))
        compared = compare(
            self._placement,
            self._traffic[0].ep_rank,
            SentCounts(rows, pairs, pairs_remote),
            true_choices_G=[pairs],
            null_choices_G=[choices - pairs],
            tokens_G=[tokens],
        )
        return {**compared, "payload_bytes": payload, "inter_node_bytes": 0, "metadata_bytes": metadata}

    def _record(
        self,
        sums_LX: np.ndarray,
        ledger: Mapping[str, int],
        loss: float | None,
        grad_norm: float | None,
        lr: float | None,
    ) -> Record:
        choices_LC, tokens_L1 = sums_LX[:, :-EXTRA].astype(np.int64), sums_LX[:, -2:-1].astype(np.int64)
        tokens, groups, seconds = int(tokens_L1.max()), self._placement.groups, time.perf_counter() - self._began
        self._tokens += tokens
        name, labels = groups[0].modalities[0], 0 if loss is None else max(1, tokens)
        counts = RoutingCounts(choices_LC, tokens_L1, sums_LX[:, -1:], np.zeros_like(choices_LC))
        arrays = routing_arrays(counts, self._placement)
        routing = routing_scalars(counts, arrays, self._placement, tag_plan(1, 1))
        costs: dict[str, float | None] = comm_scalars(ledger, None) if ledger else dict.fromkeys(UNKNOWN_COSTS)
        chosen = ratio(choices_LC.sum(), groups[0].top_k * tokens_L1.sum())
        scalars = {
            "loss/total": loss,
            f"loss/{name}": loss,
            "loss/balance": None,
            "loss/z": None,
            "optim/lr": lr,
            "optim/grad_norm": grad_norm,
            "optim/skipped_steps": None,
            "optim/tokens": float(self._tokens),
            **routing,
            f"moe/null_fraction/{groups[0].name}": None if chosen is None else 1.0 - chosen,  # of absent choices
            "moe/balance_efficiency_by_count": ratio(1.0, routing["moe/rank_imbalance"] or 0.0),
            **costs,
            "perf/tokens_per_second": ratio(tokens, seconds),
            "perf/step_seconds": seconds,
            "perf/mfu": None,
            **dict.fromkeys(("device/utilisation", "device/memory", "device/power", f"data/epochs/{name}")),
        }
        return Record(
            step=self._step,
            skipped=False,
            scalars=scalars,
            losses={name: loss},
            labels={name: labels},
            epochs={name: 0.0},
            balance_coefficient=math.nan,
            arrays=arrays,
            ledger=ledger,
            target_G=np.full(len(groups), np.nan),
        )


attach = Attached


def _drop_compiled() -> None:
    """Drops all code that torch.compile has made in this process. Compiled code does not notice that hooks came or went, so
    that the next forward passes must compile again."""
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import takes a second
        torch.compiler.reset()


def _configuration(model: nn.Module, routers: Routers) -> dict[str, Any]:
    """Returns the values that the byte ledger of a report needs, under the same keys as in a run's configuration."""
    hidden = cast(Tensor, routers.modules[0].weight).shape[-1]
    dtype = next(each.dtype for each in model.parameters() if each.is_floating_point())
    return {
        "model": {"hidden_dim": hidden},
        "parallel": {"precision": "bf16" if dtype.itemsize == 2 else "fp32"},
        "train": {"micro_batch": 1},
        "attached": type(getattr(model, "_orig_mod", model)).__name__,  # of torch.compile's wrapper
    }
