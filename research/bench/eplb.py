"""Compares the placement solver with DeepSeek's EPLB with equal numbers of slots: python -m research.bench.eplb EPLB_FILE
[TRACE.npz ...]

EPLB_FILE is eplb.py of github.com/deepseek-ai/EPLB, which is not part of moe_dist. For each set of expert loads, each
solver makes one placement for all layers (as moe_dist does) and one placement per layer (as EPLB does). Both solvers run
once without spare slots, and once with a spare slot on each rank.
"""

import time
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from moe_dist.runtime.command_line import reports_errors, run_command
from research.bench.expert_copies import Copied, solve_with_copies
from research.gpu_bench.token_imbalance import WORKLOADS, WorkloadShape, workload_step

Solver = Callable[[np.ndarray, np.ndarray], Copied]
RANDOM, LAYERS = 1000, 4


@reports_errors("eplb")
def main(
    eplb: Annotated[Path, typer.Argument(help="eplb.py of DeepSeek's EPLB.")],
    traces: Annotated[list[Path] | None, typer.Argument(help="Files with ids_TLK, as plan_holdout stores them.")] = None,
) -> None:
    """Print the work of the busiest ranks, summed over layers: our solver's divided by EPLB's. Ends with exit code 1 if a
    ratio is above 1."""
    spec = spec_from_file_location("eplb", eplb)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs, worst = eplb_solver(module), 0.0
    for name, loads in (("W0 to W7", workloads()), ("traces", recorded(traces or [])), ("random", random_loads())):
        ratios: dict[str, list[float]] = {}
        for load_LE, ranks in loads:
            for spare in (0, 1):
                slots_R = np.full(ranks, load_LE.shape[1] // ranks + spare)
                ours_one, theirs_one = (each(load_LE, slots_R).pace(load_LE, ranks) for each in (solve_with_copies, theirs))
                ratios.setdefault(f"one map, {spare} spare", []).append(ours_one / theirs_one)
                both = [
                    sum(each(load_1E, slots_R).pace(load_1E, ranks) for load_1E in load_LE[:, None])
                    for each in (solve_with_copies, theirs)
                ]
                ratios.setdefault(f"a map a layer, {spare} spare", []).append(both[0] / both[1])
        for kind, found in ratios.items():
            print(f"{name}, {kind}: {len(found)} loads, mean {np.mean(found):.4f}, worst {max(found):.6f}")
            worst = max(worst, *found)
    load_LE = np.random.default_rng(3).gamma(1.0, size=(60, 256))
    for spare in (0, 1):
        slots_R, seconds = np.full(64, 4 + spare), []
        for _ in range(5):
            began = time.process_time()
            solve_with_copies(load_LE, slots_R)
            seconds.append(time.process_time() - began)
        print(f"64 ranks, 256 experts, 60 layers, {spare} spare: {min(seconds) * 1e3:.0f} ms of CPU time")
    raise typer.Exit(0 if worst <= 1 + 1e-6 else 1)  # EPLB computes in fp32


def eplb_solver(module: Any) -> Solver:
    """Returns EPLB's policy without node groups, as a solver that assigns the experts to slots once for all layers."""
    import torch

    def solver(load_LE: np.ndarray, slots_R: np.ndarray) -> Copied:
        ranks, slots = len(slots_R), int(slots_R.sum())
        expert_1P, _, _ = module.rebalance_experts(torch.from_numpy(load_LE.sum(0, keepdims=True)), slots, 1, 1, ranks)
        return Copied(expert_1P[0].numpy(), np.repeat(np.arange(ranks), slots_R))

    return solver


def workloads() -> Iterator[tuple[np.ndarray, int]]:
    for ranks, experts in ((4, 16), (8, 64)):
        shape = WorkloadShape(4096, experts, 2, ranks)
        for name in WORKLOADS:
            drawn = [workload_step(name, seed=layer, step=4, shape=shape).expert_TK for layer in range(LAYERS)]
            yield np.stack([np.bincount(each.ravel(), minlength=experts) for each in drawn]).astype(float), ranks


def recorded(paths: list[Path]) -> Iterator[tuple[np.ndarray, int]]:
    for path in paths:
        ids_TLK = np.load(path)["ids_TLK"]
        counted = [np.bincount(ids[(ids >= 0) & (ids < 16)], minlength=16) for ids in ids_TLK.transpose(1, 0, 2)]
        for ranks in (2, 4, 8):
            yield np.stack(counted).astype(float), ranks


def random_loads() -> Iterator[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(0)
    for _ in range(RANDOM):
        ranks = int(rng.choice([2, 4, 8]))
        experts, layers = ranks * int(rng.integers(1, 5)), int(rng.integers(1, LAYERS + 1))
        yield rng.gamma(rng.choice([0.3, 1.0, 5.0]), size=(layers, experts)), ranks


if __name__ == "__main__":
    run_command(main)
