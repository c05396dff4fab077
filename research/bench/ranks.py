"""Starts one single-threaded process per rank on this machine. Rank 0 writes each result into the file as soon as it is
measured."""

import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe_dist.errors import ConfigError
from moe_dist.runtime.run_folder import write_atomically
from moe_dist.runtime.signals import child_of
from tools.calibrate import RANK_ENV

TIMEOUT_SECONDS = 900.0
SCALING_TOKENS = 2048  # the slope of time leaves out points of fewer tokens, because fixed costs dominate their times


@dataclass(frozen=True)
class BenchJob:
    """The options of one benchmark, equal on all ranks; `rounds` and `seed` are fields of `measure.Effort`."""

    world_size: int
    path: Path  # JSON file of the results; rows in the file are not measured again
    only: tuple[str, ...]  # sweeps to measure; empty for all sweeps
    quick: bool  # whether to measure tiny points, only to test the code
    rounds: int
    seed: int
    commit: str = ""  # commit of the measured code; each row stores it

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the settings that all rows of a file must share. Rows with different settings cannot be compared."""
        versions = {package: version(package) for package in ("torch", "megatron-core")}
        return {"world": self.world_size, "quick": self.quick, "rounds": self.rounds, "seed": self.seed, **versions}

    def wants(self, key: str) -> bool:
        """Returns true if the row '<sweep>/<label>' belongs to a sweep that was chosen."""
        return not self.only or key.partition("/")[0] in self.only


def measure(job: BenchJob, *, fresh: bool = False) -> None:
    """Measures all rows of the chosen sweeps, writes them into `job.path`, and blocks until all ranks have ended.

    Args:
        fresh: Whether to measure chosen rows again if the file already has them.

    Raises:
        ConfigError: the file's rows have other settings than `job`; nothing was measured.
        RuntimeError: a rank failed; the rank's traceback is on standard error.
    """
    results = read_results(job.path)
    kept = {key: row for key, row in results["rows"].items() if not (fresh and job.wants(key))}
    if kept and results["settings"] != job.settings:
        raise ConfigError(
            [
                f"{name}={job.settings.get(name)!r}: the rows of {job.path} were measured with {name}={value!r} and cannot "
                "stand beside others; measure all with --fresh, or name another file with --json"
                for name, value in results["settings"].items()
                if job.settings.get(name) != value
            ]
        )
    if len(kept) < len(results["rows"]):
        write_atomically(job.path, json.dumps({**results, "rows": kept}, indent=1) + "\n")
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes  # takes seconds to import

    os.environ.update(RANK_ENV)  # each rank inherits these variables and reads them when it imports torch
    with tempfile.TemporaryDirectory(prefix="moe_dist_bench_") as folder:
        arguments = (job, folder, os.getpid())
        ranks = start_processes(_rank, arguments, job.world_size, join=False, daemon=True, start_method="spawn")
        assert ranks is not None
        try:
            while not ranks.join(grace_period=1.0):  # when a rank fails, the other ranks get 1 s for their tracebacks
                pass
        except ProcessExitedException as error:
            raise RuntimeError(f"rank {error.error_index} of {job.world_size} failed") from error


def _rank(rank: int, job: BenchJob, folder: str, parent: int) -> None:
    child_of(parent, ignore_stop=False)()
    try:
        import torch

        from moe_dist.megatron.cpu_trial import megatron_on_cpu
        from moe_dist.megatron.process_groups import model_parallel
        from moe_dist.parallel.mesh import destroy_world, init_world, make_mesh

        torch.set_num_threads(1)
        cpu = torch.device("cpu")
        init_world(
            init_method=f"file://{folder}/store", rank=rank, world_size=job.world_size, device=cpu, timeout=TIMEOUT_SECONDS
        )
        mesh = make_mesh(ep=job.world_size, device=cpu, timeout=TIMEOUT_SECONDS)
        with megatron_on_cpu(), model_parallel(ep=job.world_size):
            _measure_all(job, mesh)
        destroy_world()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # a normal exit would wait for ranks that may hang in a collective


def _measure_all(job: BenchJob, mesh: Any) -> None:
    """Measures all rows that the results file lacks. All ranks find the same rows to measure: each rank reads the file
    before its first row, and rank 0 writes a row only after all ranks have measured this row."""
    from research.bench.measure import Effort

    results = read_results(job.path)
    effort = Effort(rounds=job.rounds, warmup=1 if job.quick else 3, seed=job.seed)
    todo = {key: measure for key, measure in _tasks(job, mesh, effort).items() if key not in results["rows"]}
    for number, (key, task) in enumerate(todo.items()):
        began = time.monotonic()
        row = task()
        if mesh.rank:
            continue
        seconds = time.monotonic() - began
        results["rows"][key] = {**row, "seconds": seconds, "load": os.getloadavg()[0], "commit": job.commit}
        results["settings"] = job.settings
        job.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(job.path, json.dumps(results, indent=1) + "\n")
        print(f"{number + 1}/{len(todo)} {key}: {seconds:.1f} s", flush=True)


def _tasks(job: BenchJob, mesh: Any, effort: Any) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """Maps the key '<sweep>/<label>' of each chosen row to the function that measures it, in the order of measurement."""
    from research.bench.dispatch_rows import measure_point, measure_scaling
    from research.bench.layers import LAYERS, QUICK_LAYERS, measure_layer, measure_step
    from research.bench.points import quick_sweeps, sweeps

    chosen = quick_sweeps() if job.quick else sweeps()
    tasks: dict[str, Callable[[], dict[str, Any]]] = {
        f"{sweep}/{label}": partial(measure_point, point, mesh, effort)
        for sweep, points in chosen.items()
        for label, point in points
    }
    for by in ("tokens", "experts"):
        smallest = SCALING_TOKENS if by == "tokens" and not job.quick else 0
        points = {label: point for label, point in chosen.get(by, ()) if point.tokens >= smallest}
        if points:
            tasks[f"scaling/{by}"] = partial(measure_scaling, points, mesh, effort, by=by, planned=True)
            tasks[f"scaling/{by}, with the plan"] = partial(measure_scaling, points, mesh, effort, by=by, planned=False)
    for name, size in (QUICK_LAYERS if job.quick else LAYERS).items():
        tasks[f"layer/{name}"] = partial(measure_layer, size, mesh, effort)
    tasks["step/default model"] = partial(measure_step, mesh, effort)
    return {key: task for key, task in tasks.items() if job.wants(key)}


def read_results(path: Path) -> dict[str, Any]:
    """Reads the settings and table rows of a results file. Settings and rows are empty if there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {"settings": {}, "rows": {}}
