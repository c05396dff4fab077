"""Measures the speed of this machine's matrix products, copies, kernel launches and exchanges, and writes it into a file
for `moe-dist plan`. See docs/planning.md."""

import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import psutil
import typer

from moe_dist.errors import ConfigError, ResourceError
from moe_dist.plan.rates import CurveSection, LinkSection, Rates, rates_text
from moe_dist.runtime.command_line import print_done, reports_errors, run_command, takes
from moe_dist.runtime.files import make_writable, write_atomically
from tools.gpu_check.outcome import CheckJob
from tools.gpu_check.process import on_ranks

# By default glibc returns blocks of 32 MiB and more to the system on each free, and the next allocation needs new pages,
# which takes 10 ms for 32 MiB. With the settings below glibc keeps freed blocks as CUDA's allocator does.
RANK_ENV = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}
QUIET = 0.25  # rates use this quantile of the repeats' seconds, because other processes on the machine slow some repeats
ROWS, EXPERTS = (16, 64, 256, 1024, 4096), 8
LAUNCHED = 64  # number of operations in the chain whose forward and backward are timed
EXCHANGED = (1 << 12, 1 << 18, 1 << 22)  # number of bytes that a rank sends to each other rank
TIMEOUT = 300.0


@dataclass(frozen=True)
class CalibrateOptions:
    out: Annotated[Path, typer.Option("--out", "-o", help="File of the rates.")] = Path("rates.yaml")
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes CUDA if there is a GPU.")] = "auto"
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Data type of the products.")] = "fp32"
    hidden: Annotated[int, typer.Option(min=8, help="model.hidden_dim of the runs to plan.")] = 1024
    ffn: Annotated[int, typer.Option(min=8, help="ffn_dim of the runs to plan.")] = 1024
    ranks: Annotated[int, typer.Option(min=1, help="Most processes that exchange data; on CUDA at most the GPUs.")] = 2
    seconds: Annotated[float, typer.Option(min=0.001, help="Seconds of each measurement.")] = 0.5


@reports_errors("calibrate")
@takes(CalibrateOptions)
def main(options: CalibrateOptions) -> None:
    """Measure the rates of this machine for moe-dist plan."""
    import torch

    if options.out.suffix != ".yaml":
        raise ConfigError(f"--out {options.out}: the name must end with .yaml; take rates.yaml")
    make_writable(options.out.parent, option=f"--out {options.out}")
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ResourceError("--device cuda: torch finds no GPU on this machine; take --device cpu")
    found = torch.cuda.device_count() if cuda else options.ranks
    if options.ranks > found:
        raise ResourceError(f"--ranks {options.ranks}: there are {found} GPUs; take at most --ranks {found}")
    torch.set_num_threads(1)  # each rank of a run on a CPU computes with one thread
    rates = measure(options, "cuda" if cuda else "cpu")
    write_atomically(options.out, rates_text(rates).encode())
    print_done(f"{options.out}: rates of {rates.machine}; plan with moe-dist plan CONFIG --rates {options.out}")


def measure(options: CalibrateOptions, device: str) -> Rates:
    """Measures all rates. Products, copies and launches run in this process, exchanges run between child processes."""
    import torch
    from torch.nn.functional import cross_entropy, scaled_dot_product_attention

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]

    def drawn(*shape: int) -> Any:
        return torch.randn(*shape, device=device, dtype=dtype)

    def seconds(run: Callable[[], Any]) -> float:
        return _seconds(run, options.seconds)

    weights = drawn(EXPERTS, options.hidden, options.ffn)
    dense, grouped = [], []
    for rows in ROWS:
        x, pair = drawn(rows, options.hidden), 2.0 * rows * options.hidden * options.ffn
        dense.append(pair / seconds(lambda x=x: x @ weights[0]))
        grouped.append(EXPERTS * pair / seconds(lambda x=x: [x @ weight for weight in weights]))
    heads, length, width = 8, 512, 64
    query = drawn(1, heads, length, width)
    attention = 4.0 * heads * length**2 * width / seconds(lambda: scaled_dot_product_attention(query, query, query))
    source = drawn(1 << 24)
    target, small = torch.empty_like(source), torch.zeros(16, device=device, requires_grad=True)
    copy = 2.0 * source.nbytes / seconds(lambda: target.copy_(source))
    launch = seconds(lambda: launched(small)) / (3 * LAUNCHED)  # backward counts as two forward passes
    logits, words = drawn(512, 4096).float().requires_grad_(), torch.zeros(512, dtype=torch.int64, device=device)
    loss = 3.0 * logits.nbytes / seconds(lambda: cross_entropy(logits, words).backward())
    sync = seconds(torch.zeros(1, device=device).item)
    worlds = [n for n in (2, 4, 8, 16) if n < options.ranks] + [options.ranks] * (options.ranks > 1)
    links = [exchange(n, device, options.seconds) for n in worlds]
    sizes = tuple(map(float, ROWS))
    memory = psutil.virtual_memory().total / options.ranks
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    return Rates(
        machine=platform.node(),
        card=torch.cuda.get_device_name(0) if device == "cuda" else platform.machine(),
        source="measured",
        memory=float(memory),
        gemm=CurveSection(sizes=sizes, rates=tuple(dense)),
        grouped=CurveSection(sizes=sizes, rates=tuple(grouped)),
        attention=attention,
        copy_rate=copy,
        loss=loss,
        launch=launch,
        sync=sync,
        cores=None if device == "cuda" else len(os.sched_getaffinity(0)),
        ranks_per_node=torch.cuda.device_count() if device == "cuda" else options.ranks,
        inside=tuple(links) or (LinkSection(ranks=1, latency=0.0, bytes_per_second=copy),),
    )


def launched(x: Any) -> None:
    """Runs a chain of small operations forward and backward."""
    y = x
    for _ in range(LAUNCHED):
        y = y.sigmoid()
    y.sum().backward()


def _seconds(run: Callable[[], Any], least: float) -> float:
    from torch.utils.benchmark import Timer

    run()
    times = Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=least).times
    return float(np.quantile(times, QUIET))


def exchange(ranks: int, device: str, least: float) -> LinkSection:
    """Starts `ranks` processes on this machine, which send each other messages of each size in `EXCHANGED`. For each
    size, takes the quantile `QUIET` of the measured seconds, and fits latency and bytes per second to these values.

    Raises:
        ResourceError: a rank failed; the message has the rank's error.
    """
    os.environ.update(RANK_ENV)
    ends = time.time() - psutil.Process().create_time() + TIMEOUT
    with tempfile.TemporaryDirectory(prefix="moe_dist_calibrate_") as folder:
        job = CheckJob(ranks, rehearse=device == "cpu", folder=Path(folder), seconds=ends)
        try:
            found = on_ranks(_exchange, job, least)[0]
        except RuntimeError as error:
            raise ResourceError(f"{error}; the ranks could not exchange messages") from error
    return fitted_link(ranks, [(ranks - 1) * size for size in EXCHANGED], found)


def fitted_link(ranks: int, sent: Sequence[float], seconds: Sequence[float]) -> LinkSection:
    """Fits latency and rate in seconds = latency + (bytes sent by a rank) / rate. Minimises the relative errors."""
    weight = 1 / np.array(seconds)
    design = np.stack([np.ones(len(sent)), np.array(sent, float)], axis=1) * weight[:, None]
    latency, each = np.linalg.lstsq(design, np.ones(len(sent)), rcond=None)[0].tolist()
    if latency < 0.0 or each <= 0.0:  # possible with noisy times; the largest exchange then determines the rate
        latency, each = 0.0, seconds[-1] / sent[-1]
    return LinkSection(ranks=ranks, latency=latency, bytes_per_second=1 / each)


def _exchange(job: CheckJob, mesh: Any, least: float) -> list[float]:
    """Exchanges messages of each size for at least `least` seconds and at least six times. Returns the quantile `QUIET`
    of the seconds of each size; the first exchange of a size is not counted."""
    import torch
    import torch.distributed as dist

    found: list[float] = []
    for size in EXCHANGED:
        source = torch.zeros(job.gpus * size // 4, device=mesh.device)
        target, taken, go = torch.empty_like(source), [], torch.ones(1, device=mesh.device)
        began = time.perf_counter()
        while go.item() > 0:
            start = time.perf_counter()
            dist.all_to_all_single(target, source)
            target[:1].item()  # waits for the device
            taken.append(time.perf_counter() - start)
            go.fill_(float(len(taken) < 6 or time.perf_counter() - began < least))
            dist.broadcast(go, 0)  # rank 0 decides when all ranks stop
        found.append(float(np.quantile(taken[1:], QUIET)))
    return found


if __name__ == "__main__":
    run_command(main)
