"""Compares moe_dist's expert parallelism in transformers with transformers' own `all_to_all`, on 4 ranks of this machine:

python -m research.bench.hf_ep [--json FILE]

In turn, both run forward and backward of the same experts (Qwen3-MoE, fp32) for the same choices. `grouped_mm` and `eager`
are tried first, and both then take the one with which `all_to_all` is faster. `all_to_all` raises an IndexError for a null
choice. Its null choices therefore have weight 0 and an expert on the token's own rank, so that they cost no bytes.

Shape letters: T tokens of a rank, D hidden size, K choices of a token, E experts.
"""

import itertools
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.run_folder import write_atomically
from moe_dist.runtime.signals import child_of
from tools.calibrate import RANK_ENV

TOKENS, HIDDEN, FFN = 512, 256, 128
RESAMPLES, TRIALS, TIMEOUT_SECONDS = 2000, 5, 300.0
SETTINGS = ("grouped_mm", "eager")  # values of transformers' `experts_implementation`
OURS, THEIRS = "moe_dist", "all_to_all"


@dataclass(frozen=True)
class Point:
    """One workload. `nulls` is the share of the choices that are null."""

    top_k: int
    experts: int
    nulls: float

    @property
    def most_bytes(self) -> float | None:
        """The largest share of the rival's bytes that we want to send, or None."""
        return {2: 0.92, 8: 0.5}.get(self.top_k) if not self.nulls else None

    @property
    def most_time(self) -> float | None:
        """The largest ratio of times that we want, or None."""
        return 1.0 if self.nulls >= 0.5 else {2: 1.15, 8: 1.0}.get(self.top_k)


POINTS = [Point(*each) for each in itertools.product((2, 4, 8), (16, 64, 128), (0.0, 0.5, 0.9))]


@reports_errors("hf_ep")
def main(
    world: Annotated[int, typer.Option(min=2, help="Number of ranks.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Timed pairs at each point.")] = 30,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a rank.")] = TOKENS,
    quick: Annotated[bool, typer.Option("--quick", help="Measure three points, to see that it runs.")] = False,
    json: Annotated[Path, typer.Option(help="File of results.")] = Path(".cache/bench/hf_ep.json"),
) -> None:
    """Measure all points, print a table, and write the file. Ends with exit code 1 if a target is missed."""
    from torch.multiprocessing.spawn import start_processes  # takes seconds to import

    os.environ.update(RANK_ENV, HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory(prefix="moe_dist_hf_ep_") as folder:
        arguments = (world, rounds, tokens, quick, folder, json, os.getpid())
        started = start_processes(_rank, arguments, world, join=False, daemon=True, start_method="spawn")
        assert started is not None
        while not started.join(grace_period=1.0):
            pass
    raise typer.Exit(1 if missed(read(json)) else 0)


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the targets that the rows miss."""
    found = []
    for row in rows:
        point = Point(**row["point"])
        for name, value, most in (
            ("bytes", row["bytes_ratio"], point.most_bytes),
            ("time", row["time_ratio_upper"], point.most_time),
        ):
            if most is not None and value > most:
                found.append(f"{point}: {name} {value:.3f} > {most}")
    return found


def _rank(rank: int, world: int, rounds: int, tokens: int, quick: bool, folder: str, path: Path, parent: int) -> None:
    child_of(parent, ignore_stop=False)()
    try:
        import torch

        from moe_dist.parallel.mesh import destroy_world, init_world, make_mesh
        from research.bench.measure import Effort

        torch.set_num_threads(1)
        cpu = torch.device("cpu")
        init_world(f"file://{folder}/store", rank=rank, world_size=world, device=cpu, timeout=TIMEOUT_SECONDS)
        mesh, rows = make_mesh(ep=world, device=cpu, timeout=TIMEOUT_SECONDS), []
        for point in POINTS[::13] if quick else POINTS:
            began = time.monotonic()
            rows.append({**_measured(point, mesh, tokens, Effort(rounds)), "load": os.getloadavg()[0]})
            if rank == 0:
                print(f"{_line(rows[-1])}  {time.monotonic() - began:.0f} s", flush=True)
        if rank == 0:
            settings = {"world": world, "cores": len(os.sched_getaffinity(0)), "rounds": rounds, "tokens": tokens}
            versions = {name: __import__(name).__version__ for name in ("torch", "transformers")}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({**settings, **versions, "rows": rows}, indent=1) + "\n")
            print(*(missed(rows) or ["all targets are met"]), sep="\n")
        destroy_world()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # a normal exit would wait for ranks that may hang in a collective


def _line(row: dict[str, Any]) -> str:
    """Returns a line of the table."""
    point, rows, time_ratio = row["point"], row["rows"], row["time_ratio"]
    return (
        f"K {point['top_k']} E {point['experts']:3} nulls {point['nulls']:.1f}  {row['setting']:10}  rows {rows[OURS]:6} / "
        f"{rows[THEIRS]:6}  bytes {row['bytes_ratio']:.3f}  time {time_ratio['median']:.3f}, at most "
        f"{row['time_ratio_upper']:.3f}  {row['milliseconds'][OURS]:.1f} / {row['milliseconds'][THEIRS]:.1f} ms"
    )


def _measured(point: Point, mesh: Any, tokens: int, effort: Any) -> dict[str, Any]:
    """Returns the results of a point, equal on all ranks."""
    from research.bench.measure import Effort, paired_ratio, time_interleaved

    runs = {setting: _contenders(point, mesh, tokens, setting) for setting in SETTINGS}
    trial = time_interleaved({name: each[THEIRS] for name, each in runs.items()}, mesh, Effort(TRIALS, warmup=1))
    setting = min(trial, key=lambda name: float(np.median(trial[name])))
    contenders = runs[setting]
    values = {name: run() for name, run in contenders.items()}
    _check_equal(values)
    sent = {name: _sent(run, mesh) for name, run in contenders.items()}
    distinct, pairs = _distinct(point, mesh, tokens)
    # Dispatch, combine, and backward of each send every row once.
    assert sent[OURS][0] == 4 * distinct, "moe_dist sends a row for each distinct (token, other rank)"
    assert sent[THEIRS][0] == 4 * pairs, "all_to_all sends a row for each (token, expert) on another rank"
    seconds = time_interleaved(contenders, mesh, effort)
    return {
        "point": asdict(point),
        "setting": setting,
        "trial_milliseconds": {name: float(np.median(each)) * 1e3 for name, each in trial.items()},
        "rows": {OURS: distinct, THEIRS: pairs},
        "bytes": {name: each[1] for name, each in sent.items()},
        "bytes_ratio": sent[OURS][1] / sent[THEIRS][1] if sent[THEIRS][1] else 1.0,
        "milliseconds": {name: float(np.median(each)) * 1e3 for name, each in seconds.items()},
        "time_ratio": asdict(paired_ratio(seconds[OURS], seconds[THEIRS])),
        "time_ratio_upper": upper_bound(seconds[OURS] / seconds[THEIRS]),
        "seconds": {name: each.round(6).tolist() for name, each in seconds.items()},
    }


def upper_bound(ratios: np.ndarray) -> float:
    """Returns the 95 % upper bound of the median by the bootstrap: the 95th percentile of the medians of resamples."""
    picked = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    return float(np.quantile(np.median(ratios[picked], axis=1), 0.95))


def _choices(point: Point, rank: int, tokens: int) -> tuple[Any, Any, Any, Any]:
    """Draws hidden states [T, D], choices [T, K] (E for a null choice), weights [T, K] and the gradient of y [T, D]."""
    import torch

    generator = torch.Generator().manual_seed(rank)
    h_TD, grad_TD = torch.randn(2, tokens, HIDDEN, generator=generator)
    weight_TK, expert_TK = torch.randn(tokens, point.experts, generator=generator).softmax(-1).topk(point.top_k, -1)
    null_TK = torch.rand(tokens, point.top_k, generator=generator) < point.nulls
    return h_TD, expert_TK.masked_fill(null_TK, point.experts), weight_TK.masked_fill(null_TK, 0.0), grad_TD


def _distinct(point: Point, mesh: Any, tokens: int) -> tuple[int, int]:
    """Returns the numbers of distinct (token, other rank) pairs and (token, remote expert) pairs, over all ranks."""
    each, distinct, pairs = point.experts // mesh.ep_size, 0, 0
    for rank in range(mesh.ep_size):
        for experts in _choices(point, rank, tokens)[1].tolist():
            away = [expert // each for expert in experts if expert < point.experts and expert // each != rank]
            distinct, pairs = distinct + len(set(away)), pairs + len(away)
    return distinct, pairs


def _contenders(point: Point, mesh: Any, tokens: int, setting: str) -> dict[str, Callable[[], Any]]:
    """Returns for each implementation a function that runs forward and backward, and returns output and gradients."""
    import torch
    from torch import nn
    from transformers import Qwen3MoeConfig
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import moe_dist.hf.ep  # noqa: F401

    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=FFN, num_experts=point.experts)
    config._experts_implementation = setting
    h_TD, null_TK, weight_TK, grad_TD = _choices(point, mesh.ep_rank, tokens)
    local = mesh.ep_rank * point.experts // mesh.ep_size
    ids = {OURS: null_TK, THEIRS: null_TK.where(null_TK < point.experts, local)}

    def contender(name: str) -> Callable[[], Any]:
        experts: Any = Qwen3MoeExperts(config)
        generator = torch.Generator().manual_seed(0)
        for parameter in experts.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        plan = {f"experts.{name}": "grouped_gemm" for name in ("gate_up_proj", "down_proj")}
        plan |= {"experts": "ep_dispatch_experts"}
        # All ranks are one EP group, and no two ranks have the same tokens.
        apply_expert_parallelism(nn.ModuleDict({"experts": experts}), mesh.world_mesh, mesh.edp_mesh, plan, name)

        def run() -> Any:
            h, weight = h_TD.clone().requires_grad_(), weight_TK.clone().requires_grad_()
            experts.zero_grad()
            y_TD = experts(h, ids[name], weight)
            y_TD.backward(grad_TD)
            return y_TD.detach(), h.grad, *(each.grad.to_local() for each in experts.parameters())

        return run

    return {name: contender(name) for name in (OURS, THEIRS)}


def _check_equal(values: dict[str, Any]) -> None:
    """Both implementations compute the same outputs and gradients."""
    import torch

    for ours, theirs in zip(values[OURS], values[THEIRS], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def _sent(run: Callable[[], Any], mesh: Any) -> tuple[int, int]:
    """Runs once. Returns the rows and the bytes, metadata included, that all ranks send to other ranks in all-to-alls."""
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    sent = torch.zeros(2, dtype=torch.int64)

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            if "alltoall_base" in name or "all_to_all_single" in name:
                items, splits = (args[1], args[4]) if "alltoall_base" in name else (args[0], args[2])
                each = list(splits) or [items.shape[0] // mesh.ep_size] * mesh.ep_size
                remote, width = sum(each) - each[mesh.ep_rank], items[:1].numel()
                is_row = items.ndim == 2 and items.shape[1] == HIDDEN
                sent.add_(torch.tensor([remote * is_row, remote * width * items.element_size()]))
            return func(*args, **(kwargs or {}))

    with Counting():
        run()
    dist.all_reduce(sent)
    rows, num_bytes = sent.tolist()
    return rows, num_bytes


if __name__ == "__main__":
    run_command(main)
