"""Starts all ranks together: they open one store of torch.distributed, wait for each other, and use rank 0's attempt_id.
The store has these keys:

    run               name of the run whose rank 0 uses the store, and rank 0's host
    hello/N           token of the Nth process that came
    welcome/TOKEN     rank 0's greeting to the process with this token
    KEY/answer/N      a rank, its exit code, and the reason if the rank does not start
    KEY/go            rank 0's decision: an exit code, and the errors
    KEY/world/        prefix of the keys of process groups

All keys begin with moe_dist/. torchrun's store survives a restart, so it may contain keys of earlier starts. TOKEN and KEY
are therefore random, and a rank reads only keys with its own token or the KEY of this start.
"""

import concurrent.futures
import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, FileStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from moe_dist.errors import EXIT_DONE, ConfigError, MoeDistError, StoppedError
from moe_dist.runtime.environment import PUBLISHED, RankEnv
from moe_dist.runtime.rendezvous import (
    POLL_SECONDS,
    Greeting,
    StartError,
    StartWait,
    address_file,
    find,
    listening_host,
    publish,
    ranks_text,
    withdraw,
)

STORE_SECONDS = timedelta(seconds=60.0)
HANDSHAKE_SECONDS = 2.0  # seconds in which a store must answer a new client
_ERRORS: dict[int, type[MoeDistError]] = {each.exit_code: each for each in (ConfigError, StoppedError)}


@contextmanager
def meeting(env: RankEnv, run_folder: Path, wait: StartWait) -> Iterator[tuple[Store, str]]:
    """Waits until all ranks have joined the start. Yields the store for the ranks' process groups, and rank 0's attempt_id,
    with which all ranks identify this attempt (one start of the job). The caller must create the process group inside the
    `with` block.

    Raises:
        ConfigError: ranks differ in WORLD_SIZE, MOE_DIST_ATTEMPT_ID or run folder (the error names rank, host and values),
            or another run uses MASTER_PORT.
        StartError, StoppedError: `wait` raised this error on this rank or on rank 0, or the store's owner has ended.
        ResourceError: see `publish`.
    """
    with _store(env, run_folder, wait) as shared:
        store = PrefixStore("moe_dist", shared)
        try:
            greeting = _receive(store, env, run_folder, wait) if env.rank == 0 else _join(store, env, run_folder, wait)
        except DistError as error:
            raise StartError(
                f"rank {env.rank} lost the store of the start, whose owner has ended; see the logs of rank 0 and of the "
                f"launcher ({str(error).partition(chr(10))[0]})"
            ) from error
        yield PrefixStore(f"{greeting.key}/world", store), greeting.attempt_id


class Mailbox:
    """Posts messages to a store, and reads them in the order of their arrival."""

    def __init__(self, store: Store) -> None:
        self._store, self._count, self._due = store, 0, list[int]()

    def post(self, text: str) -> None:
        self._store.set(str(self._store.add("count", 1)), text)

    def new(self) -> list[str]:
        """Returns the messages since the last call. If there are none, the call costs one request to the store."""
        before, self._count = self._count, self._store.add("count", 0)
        due = [*self._due, *range(before + 1, self._count + 1)]
        # A process that died in `post` before `set` leaves a number without a message.
        here = [number for number in due if self._store.check([str(number)])]
        self._due = [number for number in due if number not in here]
        return [self._store.get(str(number)).decode() for number in here]


def _receive(store: Store, env: RankEnv, run_folder: Path, wait: StartWait) -> Greeting:
    """Greets all ranks, waits for their answers, and tells them the decision. Only rank 0 calls this function."""
    host, folder = socket.gethostname(), str(run_folder.absolute())
    store.set("run", json.dumps([run_folder.name, host]))  # read by ranks of other runs that use this store by mistake
    greeting = Greeting(env.attempt_id, env.world_size, host, folder, secrets.token_hex(8))
    hellos, start = Mailbox(PrefixStore("hello", store)), PrefixStore(greeting.key, store)
    answers, missing = Mailbox(PrefixStore("answer", start)), set(range(1, env.world_size))
    several_nodes = env.local_world_size < env.world_size
    try:
        if several_nodes:
            greeting.probe(run_folder).touch()
        while missing:
            for token in hellos.new():
                store.set(f"welcome/{token}", json.dumps(asdict(greeting)))
            for rank, code, problem in map(json.loads, answers.new()):
                if problem:
                    raise _ERRORS[code](problem)
                missing.discard(rank)
            if missing:
                wait.pause(ranks_text(missing))
    except MoeDistError as error:
        start.set("go", json.dumps([error.exit_code, *error.problems]))
        time.sleep(5 * POLL_SECONDS)  # gives all other ranks time to read the decision before the store ends
        raise
    finally:
        if several_nodes:
            greeting.probe(run_folder).unlink(missing_ok=True)
    start.set("go", json.dumps([EXIT_DONE]))
    return greeting


def _join(store: Store, env: RankEnv, run_folder: Path, wait: StartWait) -> Greeting:
    """Answers rank 0's greeting, and waits for rank 0's decision. All ranks except rank 0 call this function."""
    token = secrets.token_hex(8)
    Mailbox(PrefixStore("hello", store)).post(token)
    while not store.check([f"welcome/{token}"]):
        _refuse_other_run(store, run_folder)
        wait.pause("rank 0")
    _refuse_other_run(store, run_folder)
    greeting = Greeting(**json.loads(store.get(f"welcome/{token}")))
    start, error = PrefixStore(greeting.key, store), StoppedError if wait.stopped() else ConfigError
    problem = wait.stop_text("rank 0") if error is StoppedError else greeting.difference(env, run_folder)
    Mailbox(PrefixStore("answer", start)).post(json.dumps([env.rank, error.exit_code, problem]))
    if problem:
        raise error(problem)
    patience = wait.again()  # wait again: rank 0 decides when all ranks stop waiting
    while not start.check(["go"]):
        patience.pause("the ranks that rank 0 waits for; its log names them")
    code, *problems = json.loads(start.get("go"))
    if code != EXIT_DONE:
        raise _ERRORS.get(code, StartError)(problems)
    return greeting


@contextmanager
def _store(env: RankEnv, run_folder: Path, wait: StartWait) -> Iterator[Store]:
    """Yields the store that all ranks of a start use. If the store is not a file, rank 0 or torchrun's agent owns it."""
    if env.init_method.startswith("file://"):
        yield FileStore(env.init_method.removeprefix("file://"), env.world_size)
    elif env.init_method != PUBLISHED:
        yield _store_at(env, *_given_address(env.init_method), run_folder, wait)
    elif env.rank > 0:
        address = find(address_file(run_folder), env, wait)
        yield PrefixStore(address.secret, _client(address.host, address.port, wait))
    else:
        path = address_file(run_folder)
        address, listener = publish(path, env, listening_host(env, os.environ))
        try:
            own = TCPStore(
                address.host,
                address.port,
                None,
                True,
                STORE_SECONDS,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),  # passes the open socket, so that no other process can take the port
            )
            yield PrefixStore(address.secret, own)  # a peer with another secret cannot see the keys
        finally:
            withdraw(path, address)


def _given_address(init_method: str) -> tuple[str, int]:
    """Returns the host and the port of env:// or tcp://HOST:PORT. Raises ConfigError if the port number is missing."""
    host, _, port = init_method.removeprefix("tcp://").rpartition(":")
    if init_method == "env://":
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not port.isdecimal():
        raise ConfigError(
            f"MASTER_PORT or MOE_DIST_INIT_METHOD: {host}:{port} has no port number; set MASTER_PORT, or "
            "MOE_DIST_INIT_METHOD to published, file:///a/shared/path or tcp://host:port"
        )
    return host, int(port)


def _refuse_other_run(store: Store, run_folder: Path) -> None:
    """Raises ConfigError if rank 0 of another run owns the store."""
    if store.check(["run"]):
        name, host = json.loads(store.get("run"))
        if name != run_folder.name:
            raise ConfigError(
                f"MASTER_PORT: the run {name!r}, whose rank 0 is on {host}, uses this port, so {run_folder.name!r} cannot "
                "use it; set another MASTER_PORT for all its ranks"
            )


def _store_at(env: RankEnv, host: str, port: int, run_folder: Path, wait: StartWait) -> Store:
    agent = env.init_method == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if env.rank > 0 or agent:  # torchrun's agent owns the store
        return _client(host, port, wait)
    while problem := _unresolved(host):  # in Kubernetes a host name may become resolvable only seconds after the start
        wait.pause(f"a name server that knows the host of MASTER_ADDR: {problem}")
    try:
        return TCPStore(host, port, None, True, STORE_SECONDS, wait_for_workers=False, multi_tenant=True)
    except DistError as error:
        with contextlib.suppress(DistError, TimeoutError):
            other = _greet_store(host, port).result(HANDSHAKE_SECONDS)
            _refuse_other_run(PrefixStore("moe_dist", other), run_folder)
        raise StartError(
            f"rank 0 cannot open a store at {host}:{port} ({str(error).partition(chr(10))[0]}); MASTER_ADDR and "
            "MASTER_PORT must be an address and a free port of its node"
        ) from error


def _client(host: str, port: int, wait: StartWait) -> Store:
    where = f"rank 0, whose store must be at {host}:{port}"
    while True:
        try:  # a plain socket comes first, because torch would log a warning for every failed attempt
            socket.create_connection((host, port), timeout=5.0).close()
        except OSError as error:  # no process listens yet, or the host name has no address yet
            wait.pause(f"{where} ({_unresolved(host) or error})")
            continue
        answer = _greet_store(host, port)
        while not answer.done():
            concurrent.futures.wait([answer], HANDSHAKE_SECONDS)
            if not answer.done():
                wait.pause(f"{where} (a process listens there, but does not answer: another program uses MASTER_PORT)")
        try:
            return answer.result()
        except DistError as error:
            wait.pause(f"{where} ({str(error).partition(chr(10))[0]})")


def _greet_store(host: str, port: int) -> Future[TCPStore]:
    """Connects to a store in a thread, because torch waits without limit for a process that listens but never answers."""
    answer = Future[TCPStore]()

    def connect() -> None:
        try:
            answer.set_result(TCPStore(host, port, None, False, STORE_SECONDS, wait_for_workers=False))
        except DistError as error:
            answer.set_exception(error)

    threading.Thread(target=connect, name="store", daemon=True).start()
    return answer


def _unresolved(host: str) -> str:
    """Returns a text with the problem if this node finds no address for the host name; otherwise ''."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"MASTER_ADDR={host!r} does not resolve on {socket.gethostname()}: {error.strerror}"
    return ""
