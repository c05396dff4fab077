"""Runs a check, and each rank of a check, in a separate process, so that a crash or a hang ends no other check.

The processes are forks of a fork server, which has imported torch but never initialises CUDA. A check writes its outcome to
a file.
"""

import faulthandler
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil

from moe_dist.runtime.files import write_atomically
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Outcome

# Importing the modules in PRELOADED does not query a GPU.
PRELOADED = ["torch._dynamo", "tools.gpu_check.training", "moe_dist.moe.kernels.triton_kernels"]
GRACE = 10.0  # seconds that a check or rank has, after its time limit, to log the place at which it hangs
TAIL = 400  # largest number of characters of a log that a reason quotes
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)  # each check starts a server for its ranks, with the check's environment


def function_of(target: str) -> Callable[..., Any]:
    """Imports the function 'module:name'."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def run_check(name: str, target: str, job: CheckJob) -> Outcome:
    """Runs the check `target` for at most `job.seconds`, and returns its outcome, even if its process crashed."""
    out = job.folder / f"{name}.json"
    out.unlink(missing_ok=True)
    began = time.monotonic()
    process = _CONTEXT.Process(target=_check, args=(target, job, out))
    process.start()
    try:
        process.join(job.seconds + GRACE)
    finally:
        _kill(process)
    seconds = time.monotonic() - began
    if out.is_file():
        return replace(Outcome.from_json(json.loads(out.read_text())), seconds=seconds)
    log = out.with_suffix(".log")
    ended = f"no result within {job.seconds:.0f} s" if seconds >= job.seconds else _end(process.exitcode)
    return Outcome("fail", f"{ended}; {log}: {_quoted(log.read_text()) if log.is_file() else 'empty'}", seconds)


def _quoted(text: str) -> str:
    """Returns the beginning of faulthandler's output in `text`, which has the innermost call. Without such output,
    returns the end of `text`."""
    found = max(text.rfind(mark) for mark in ("Timeout (", "Fatal Python error"))
    return text[found : found + TAIL] if found >= 0 else text[-TAIL:].strip()


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code} and without a result"


def _kill(process: Any) -> None:
    if process.is_alive():
        process.kill()
        process.join()


def _prepare(log: Path, seconds: float) -> None:
    """Redirects all output into the log, and ends this process after `seconds` with a traceback in the log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable(file=2)
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)


def _check(target: str, job: CheckJob, out: Path) -> None:
    out.with_suffix(".log").unlink(missing_ok=True)
    _prepare(out.with_suffix(".log"), job.seconds)
    try:
        outcome = Outcome.of(function_of(target)(job))
    except NotPossibleError as error:
        outcome = Outcome("not possible", str(error))
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome("fail", f"{type(error).__name__}: {str(error).strip()[-2 * TAIL :]}")
    write_atomically(out, json.dumps(outcome.as_json()))
    print(f"{time.process_time():.1f} s of CPU time, without those of ranks")
    sys.stdout.flush()
    os._exit(0)  # after a CUDA error a normal exit may hang or crash


def on_ranks(body: Callable[..., Any], job: CheckJob, *arguments: Any, world: int = 0, device: str = "") -> list[Any]:
    """Calls body(job, mesh, *arguments) on `world` ranks, and returns the JSON values that the ranks return.

    Args:
        world: Number of ranks; by default `job.gpus`.
        device: Device of the ranks, by default the job's. If GPUs are fewer than ranks, ranks share GPUs and use gloo.

    Raises:
        NotPossibleError: a rank raised this error.
        RuntimeError: a rank failed. The message has the error of the rank, or the place at which the rank hung.
    """
    world, device = world or job.gpus, device or job.device
    ends = psutil.Process().create_time() + job.seconds - GRACE  # so that a hanging rank ends before the check's limit
    folder = Path(tempfile.mkdtemp(dir=job.folder))
    ranks = [
        _CONTEXT.Process(target=_rank, args=(body, job, ends, folder, rank, world, device, arguments))
        for rank in range(world)
    ]
    values: list[Any] = [None] * world
    try:
        for each in ranks:
            each.start()
        running = {each.sentinel: each for each in ranks}
        while running:
            for sentinel in wait(list(running)):
                ended = running.pop(sentinel)  # pyright: ignore[reportArgumentType]
                ended.join()
                rank = ranks.index(ended)
                file, log = folder / f"{rank}.json", folder / f"{rank}.log"
                if file.is_file():
                    values[rank], error = json.loads(file.read_text())
                else:
                    error = f"{_end(ended.exitcode)}: {_quoted(log.read_text()) if log.is_file() else ''}"
                if error:  # other ranks may wait for this rank
                    kind = NotPossibleError if error.startswith(NotPossibleError.__name__) else RuntimeError
                    raise kind(f"rank {rank} of {world} on {device}: {error}")
    finally:
        for each in ranks:
            if each.pid is not None:
                _kill(each)
        sys.stderr.write("".join(each.read_text() for each in sorted(folder.glob("*.log"))))
        shutil.rmtree(folder)
    return values


def _rank(
    body: Callable[..., Any],
    job: CheckJob,
    ends: float,
    folder: Path,
    rank: int,
    world: int,
    device: str,
    arguments: tuple[Any, ...],
) -> None:
    import torch

    from moe_dist.parallel.mesh import init_world, make_mesh

    job = replace(job, seconds=max(1.0, ends - time.time()))
    _prepare(folder / f"{rank}.log", job.seconds)
    value = error = None
    try:
        own, backend = torch.device("cpu"), None
        if device == "cuda":
            count = torch.cuda.device_count()
            own, backend = torch.device("cuda", rank % count), "gloo" if world > count else None  # NCCL: one rank per GPU
            torch.cuda.set_device(own)
        else:
            torch.set_num_threads(1)
        store = f"file://{folder / 'store'}"
        init_world(store, rank=rank, world_size=world, device=own, timeout=job.seconds, backend=backend)
        value = body(job, make_mesh(ep=world, device=own, timeout=job.seconds), *arguments)
    except BaseException as raised:
        traceback.print_exc()
        error = f"{type(raised).__name__}: {str(raised).strip()[-TAIL:]}"
    write_atomically(folder / f"{rank}.json", json.dumps([value, error]))
    sys.stdout.flush()
    os._exit(0)  # a normal exit would wait for other ranks
