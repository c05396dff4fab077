"""Standing worlds: processes with a gloo group, which many tests share.

    def body(rank: RankContext, rows: np.ndarray) -> float:      # module level, in the test file
        ...                                                      # the default process group exists here
    def test_it(run_in_world):
        results = run_in_world(4, body, rows)                    # one result per rank, in the order of the ranks

The processes of each world size live until the end of the session. Each call makes a new default process group (25 ms),
so that no group, counter or mesh leaks from one test into the next. Ranks are forked from two servers that have
imported torch and most of moe_dist, which saves each rank 3 s of CPU time. Even and odd ranks come from different
servers, which hash strings differently, so that the order of a set still differs between ranks. Arguments and results
are pickled by value. A rank that raises fails the test with the rank's traceback; a hang fails it with the stacks of
the ranks that did not answer. In both cases the world is killed by process id, and the next call starts a new one.
"""

import ast
import contextlib
import faulthandler
import functools
import gc
import importlib
import importlib.util
import inspect
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

from moe_dist.runtime.signals import child_of

START_SECONDS = 600.0
CALL_SECONDS = 600.0
# A group that is still referenced keeps gloo threads, which wake 100 times a second. Hundreds of these threads fill a core.
MAX_THREADS = 48
IMPORTED = ["tests.support.layouts", "moe_dist.train.build.training", "torch._dynamo"]  # an optimizer imports _dynamo
SETTLE_SECONDS = 0.5  # after the first failure other ranks have this time to report, and the earliest report is the cause


class WorldError(AssertionError):
    """A rank raised, died or hung; the message has the first cause."""


@dataclass(frozen=True)
class RankContext:
    """The arguments of a body that describe its rank.

    Attributes:
        rank, world_size: This rank's number, and the number of ranks, in the default process group.
        folder: An empty folder of this call, shared by all its ranks.
    """

    rank: int
    world_size: int
    folder: Path


@dataclass(frozen=True)
class _Call:
    file: str
    module: str
    function: str
    arguments: bytes
    folder: str
    seconds: float


@dataclass(frozen=True)
class _Report:
    failed: bool
    when: float  # time.monotonic, the same clock in all processes
    payload: bytes  # pickled result, or the traceback as UTF-8
    threads: int = field(default_factory=lambda: len(os.listdir("/proc/self/task")))  # after the call


# --- in the ranks


def _load(file: str, name: str) -> ModuleType:
    """Returns the module of a body. Loads a test file from its path, with pytest's assertion messages and under
    pytest's name for it, so that its classes pickle in both directions."""
    if name in sys.modules:
        return sys.modules[name]
    if not Path(file).name.startswith("test_"):
        return importlib.import_module(name)
    from _pytest.assertion.rewrite import rewrite_asserts

    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    source = Path(file).read_bytes()
    tree = ast.parse(source, filename=file)
    rewrite_asserts(tree, source, file)
    exec(compile(tree, file, "exec", dont_inherit=True), module.__dict__)
    return module


def _run(call: _Call, rank: int, world_size: int) -> bytes:
    import torch
    import torch.distributed as dist

    function: Any = _load(call.file, call.module)
    for part in call.function.split("."):
        function = getattr(function, part)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{call.folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=call.seconds),
    )
    shared = Path(call.folder) / "shared"
    shared.mkdir(exist_ok=True)
    before = _global_state()
    result = pickle.dumps(function(RankContext(rank, world_size, shared), *pickle.loads(call.arguments)))
    after = {name: value for name, value in _global_state().items() if not _hooked(value)}
    if left := [name for name, value in after.items() if name in before and before[name] is not value]:
        raise AssertionError(f"the call changes {', '.join(left[:5])} for later calls; restore it at the call's end")
    dist.barrier()  # no rank leaves while a peer may still need it
    dist.destroy_process_group()
    gc.collect()  # collects groups in reference cycles
    gc.freeze()  # the next collections skip all remaining objects, which saves 0.3 s of CPU time per call and rank
    return result


def _hooked(value: Any) -> bool:
    """Returns whether torch wrapped this function. torch wraps the `step` of an optimizer class at its first instance."""
    return isinstance(value, FunctionType) and hasattr(value, "hooked")


def _global_state() -> dict[str, Any]:
    """Returns settings of torch, and the functions and classes of loaded modules and of moe_dist's classes, by name. A body
    that patches one of them for later calls would change the results of other tests."""
    import torch

    found: dict[str, Any] = {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "torch's fp32 precision": sys.intern(torch.backends.mkldnn.matmul.fp32_precision),  # pyright: ignore
    }
    for name, module in list(sys.modules.items()):
        if name.startswith(("moe_dist.", "transformers.", "torch.nn.functional", "torch.distributed.distributed_c10d")):
            values = {f"{name}.{key}": value for key, value in list(vars(module).items()) if callable(value)}
            found |= values
            if name.startswith("moe_dist."):
                for key, value in values.items():
                    if isinstance(value, type) and value.__module__ == name:
                        found |= {f"{key}.{field}": each for field, each in vars(value).items() if callable(each)}
    return found


def _serve(rank: int, world_size: int, stacks: str, connection: Connection) -> None:
    # The server, this process's parent, ends when pytest does. If it has ended before, the connection has no other end.
    child_of(os.getppid(), ignore_stop=False)()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which ends the ranks
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    stacks_file = open(stacks, "w")  # noqa: SIM115  # faulthandler keeps the descriptor
    faulthandler.register(signal.SIGUSR1, file=stacks_file, all_threads=False)
    import torch

    torch.set_num_threads(1)
    connection.send_bytes(b"ready")
    while message := connection.recv_bytes():
        try:
            report = _Report(False, time.monotonic(), _run(pickle.loads(message), rank, world_size))
        except BaseException:  # SystemExit too, because the test shows its traceback
            # The rank stays alive with its group, so that its peers do not fail before its own report arrives.
            report = _Report(True, time.monotonic(), traceback.format_exc().encode())
        connection.send_bytes(pickle.dumps(report))


# --- in pytest


@functools.cache
def _servers() -> list[forkserver.ForkServer]:
    """Starts two servers, each with the imports that the ranks need."""
    servers = [forkserver.ForkServer() for _ in range(2)]
    for server in servers:
        server.set_forkserver_preload(IMPORTED)
        with patch.dict(os.environ, OMP_NUM_THREADS="1"):  # before torch is imported
            server.ensure_running()
    return servers


def forked(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Starts a new process that calls a function of an importable module; like a rank, it has torch and most of
    moe_dist imported."""
    process = get_context("forkserver").Process(target=target, args=arguments, daemon=True)
    with patch.object(forkserver, "connect_to_new_process", _servers()[0].connect_to_new_process):
        process.start()
    return process


@dataclass
class _Rank:
    process: BaseProcess
    connection: Connection
    stacks: Path
    report: _Report | None = None
    died: bool = False


@dataclass
class _World:
    folder: Path
    ranks: list[_Rank] = field(default_factory=list)
    calls: int = 0
    worn: bool = False  # the ranks have too many threads, so the next call starts new ones

    @classmethod
    def start(cls, world_size: int) -> "_World":
        world = cls(Path(tempfile.mkdtemp(prefix="moe_dist_world_")))
        context, servers = get_context("forkserver"), _servers()
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                stacks = world.folder / f"stacks_{rank}"
                process = context.Process(
                    target=_serve,
                    args=(rank, world_size, str(stacks), theirs),
                    name=f"world{world_size}-rank{rank}",
                    daemon=True,
                )
                connect = servers[rank % len(servers)].connect_to_new_process
                with patch.object(forkserver, "connect_to_new_process", connect):
                    process.start()
                theirs.close()
                world.ranks.append(_Rank(process, ours, stacks))
            deadline = time.monotonic() + START_SECONDS
            for rank, member in enumerate(world.ranks):
                if not member.connection.poll(deadline - time.monotonic()):
                    raise WorldError(f"rank {rank} of {world_size} did not start within {START_SECONDS:g} s")
                member.connection.recv_bytes()
        except BaseException:
            world.kill()
            raise
        return world

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> list[Any]:
        self.calls += 1
        folder = self.folder / f"call_{self.calls}"
        folder.mkdir()
        file, module = inspect.getfile(function), function.__module__
        # Peers of a hanging rank wait longer than we do, so that the failure shows its stack and not their timeout.
        call = _Call(file, module, function.__qualname__, pickle.dumps(arguments), str(folder), seconds + 30.0)
        for member in self.ranks:
            member.report = None
            with contextlib.suppress(OSError):  # if the rank died, _collect finds out
                member.connection.send_bytes(pickle.dumps(call))
        self._collect(time.monotonic() + seconds)
        failed = any(m.died or m.report is None or m.report.failed for m in self.ranks)
        if failed:
            raise WorldError(self._first_cause(seconds))
        shutil.rmtree(folder)
        reports = [m.report for m in self.ranks if m.report is not None]
        self.worn = max(report.threads for report in reports) > MAX_THREADS
        return [pickle.loads(report.payload) for report in reports]

    def _collect(self, deadline: float) -> None:
        """Reads reports until all ranks have reported or the deadline has come, or shortly after the first failure."""
        while waiting := {m.connection: m for m in self.ranks if m.report is None and not m.died}:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                return
            for connection in ready:
                assert isinstance(connection, Connection)
                member = waiting[connection]
                try:
                    member.report = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    member.died = True
                if member.died or (member.report is not None and member.report.failed):
                    deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)

    def _first_cause(self, seconds: float) -> str:
        size = len(self.ranks)
        for rank, member in enumerate(self.ranks):
            if member.died:  # died without a report; then other ranks fail because connections closed
                member.process.join(5.0)
                return f"rank {rank} of {size} died with exit code {member.process.exitcode}, without a traceback"
        failures = [
            (m.report.when, r, m.report) for r, m in enumerate(self.ranks) if m.report is not None and m.report.failed
        ]
        if failures:
            _, rank, report = min(failures, key=lambda item: item[:2])
            others = [r for _, r, _ in sorted(failures, key=lambda item: item[:2])[1:]]
            after = f"\n(after it, ranks {others} failed too)" if others else ""
            return f"rank {rank} of {size} failed:\n{report.payload.decode()}{after}"
        silent = [rank for rank, member in enumerate(self.ranks) if member.report is None]
        return f"ranks {silent} of {size} did not answer within {seconds:g} s; they are at\n{self._stacks(silent)}"

    def _stacks(self, silent: list[int]) -> str:
        for rank in silent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.ranks[rank].process.pid or 0, signal.SIGUSR1)
        time.sleep(SETTLE_SECONDS)
        return "\n".join(f"rank {rank}:\n{self.ranks[rank].stacks.read_text()}" for rank in silent)

    def kill(self) -> None:
        for member in self.ranks:
            member.process.kill()
        for member in self.ranks:
            member.process.join()
            member.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> None:
        for member in self.ranks:
            with contextlib.suppress(OSError):
                member.connection.send_bytes(b"")
        for member in self.ranks:
            member.process.join(5.0)
        self.kill()  # does nothing but clean up if the ranks have ended


class Worlds:
    """All standing worlds of a session, by size. The session fixture `worlds` yields pytest's only instance."""

    def __init__(self) -> None:
        self._worlds: dict[int, _World] = {}

    def run(
        self, world_size: int, function: Callable[..., Any], *arguments: Any, seconds: float = CALL_SECONDS
    ) -> list[Any]:
        """Calls `function(RankContext, *arguments)` on every rank of the world of this size.

        Args:
            function: A module-level function of a test file or an importable module.
            seconds: Time after which the call counts as a hang.

        Returns:
            The results in the order of the ranks.

        Raises:
            WorldError: a rank raised, died or hung.
        """
        if world_size not in self._worlds:
            self._worlds[world_size] = _World.start(world_size)
        world = self._worlds[world_size]
        try:
            results = world.call(function, arguments, seconds)
        except BaseException:  # a timeout of pytest too, because a world in an unknown state cannot be used again
            world.kill()
            del self._worlds[world_size]
            raise
        if world.worn:
            self._worlds.pop(world_size).stop()
        return results

    def pids(self, world_size: int) -> list[int]:
        """Returns the process ids of the world's ranks, or nothing if there is no such world."""
        world = self._worlds.get(world_size)
        return [member.process.pid or 0 for member in world.ranks] if world else []

    def close(self) -> None:
        """Ends all worlds."""
        while self._worlds:
            self._worlds.popitem()[1].stop()
