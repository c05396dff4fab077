"""Collects facts about a node (versions, limits, folders, GPUs) within two seconds, and encodes them as one line of JSON.
Versions come from the metadata of installed packages, because importing torch would take seconds."""

import contextlib
import errno
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

MARK = "moe_dist node facts: "  # marks the line with the facts, because the cluster file's prelude may print other lines
CONNECT_SECONDS = 5.0
INFINIBAND = Path("/sys/class/infiniband")
NO_LIMIT = -1


@dataclass(frozen=True)
class Questions:
    """The questions that the checks on a node must answer.

    Attributes:
        folder, data: run.root, to which every node must be able to write, and data.path.
        token_file: Path and content of a file that the doctor wrote into `folder`; None skips the check of this file.
        hosts: Host names that the node must be able to resolve, such as the rendezvous host.
        meeting: File with rank 0's address, for the connection test (`launchers/doctor/on_node.py`); None skips the test.
        num_nodes: Number of nodes that take part in the connection test.
    """

    folder: str
    data: str
    token_file: tuple[str, str] | None = None
    hosts: tuple[str, ...] = ()
    meeting: str | None = None
    num_nodes: int = 1


@dataclass(frozen=True)
class NodeFacts:
    """Facts about one node; None means unknown.

    Attributes:
        node: The scheduler's name of the node.
        clock: Unix seconds at the time of the answer.
        versions: Versions of Python and of packages; None for a package that is not installed.
        apex: 'nvidia', 'other' (an unrelated package named apex), or 'none'.
        gpus: Number of GPUs that NVML finds; None without NVML.
        driver: Version of NVIDIA's driver, or the error of NVML.
        shm_bytes: Size of /dev/shm.
        open_files, locked_memory: Soft limits on the number of open files and on bytes of locked memory, or NO_LIMIT.
        folder_problem: The reason why a file cannot be written to run.root and read back; empty if it can.
        free_bytes: Number of free bytes in run.root for this user.
        sees_token: True if the node can read `Questions.token_file`; None if no such file is given.
        unresolved: Host names that do not resolve, each with the resolver's error.
        unreachable: Error of the connection to rank 0's node; empty if it succeeded or was not tested.
        cores: Number of cores that a process may use on this node. In a probe, these are all its cores.
    """

    node: str
    clock: float
    versions: Mapping[str, str | None]
    apex: str
    gpus: int | None
    driver: str
    shm_bytes: int | None
    open_files: int
    locked_memory: int
    infiniband: bool
    folder_problem: str
    free_bytes: int | None
    sees_token: bool | None
    sees_data: bool
    unresolved: Mapping[str, str] = field(default_factory=dict)
    unreachable: str = ""
    cores: int | None = None


def look(questions: Questions, *, env: Mapping[str, str] = os.environ) -> NodeFacts:
    """Collects the facts of this node."""
    folder = Path(questions.folder)
    gpus, driver = nvml()
    return NodeFacts(
        node=node_name(env),
        clock=time.time(),
        versions=versions(),
        apex=apex_kind(),
        gpus=gpus,
        driver=driver,
        shm_bytes=_space(Path("/dev/shm"))[0],
        open_files=_soft_limit(resource.RLIMIT_NOFILE),
        locked_memory=_soft_limit(resource.RLIMIT_MEMLOCK),
        infiniband=INFINIBAND.is_dir() and any(INFINIBAND.iterdir()),
        folder_problem=write_problem(folder),
        free_bytes=_space(nearest(folder))[1],
        sees_token=_sees(questions.token_file),
        sees_data=Path(questions.data).exists(),
        unresolved=unresolved(questions.hosts),
        cores=len(os.sched_getaffinity(0)),
    )


def node_name(env: Mapping[str, str]) -> str:
    """Returns the scheduler's name of this node, or its host name if there is no scheduler."""
    return env.get("SLURMD_NODENAME") or env.get("MOE_DIST_NODE_NAME") or socket.gethostname()


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of packages that must be equal on all nodes. NCCL's version is None if torch was
    installed without NVIDIA's NCCL package."""
    found = {name: _version(name) for name in ("torch", "moe_dist")}
    nccl = next((v for name in ("nvidia-nccl-cu13", "nvidia-nccl-cu12") if (v := _version(name)) is not None), None)
    return {"python": platform.python_version(), **found, "nccl": nccl}


def apex_kind() -> str:
    """Returns which package `import apex` would import: 'nvidia', 'other' or 'none'."""
    try:
        spec = importlib.util.find_spec("apex")  # does not run the package's code
    except (ImportError, ValueError):
        return "other"
    if spec is None:
        return "none"
    folders = spec.submodule_search_locations or ()
    return "nvidia" if any((Path(f) / "optimizers" / "fused_adam.py").is_file() for f in folders) else "other"


def write_problem(folder: Path) -> str:
    """Writes a file to the folder, or to its nearest existing parent, and reads it back. Returns a text with the problem;
    empty if there is none."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return f"{existing}: {os.strerror(errno.ENOTDIR)}"
    folder, content = existing, secrets.token_bytes(4096)  # random, so that no cached content can match
    path = folder / f".doctor-{secrets.token_hex(8)}"
    try:
        path.write_bytes(content)
        read = path.read_bytes()
        path.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return f"{folder}: {error.strerror or error}"
    return "" if read == content else f"{folder}: a file that was written reads back with different content"


def nearest(folder: Path) -> Path:
    """Returns the folder itself, or its nearest existing parent."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def unresolved(hosts: Iterable[str]) -> dict[str, str]:
    """Returns the host names that do not resolve on this node, each with the resolver's error."""
    found = {}
    for host in hosts:
        try:
            socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)  # IPv4, because the rendezvous uses IPv4
        except OSError as error:
            found[host] = error.strerror or str(error)
    return found


def unreachable(host: str, port: int) -> str:
    """Returns the error of a connection to host:port; empty if it succeeded."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def to_line(facts: NodeFacts) -> str:
    """Returns the facts as one line, which `from_line` can read."""
    return MARK + json.dumps(asdict(facts), separators=(",", ":"))


def from_line(line: str) -> NodeFacts | None:
    """Returns the facts in a line that `to_line` made; None for any other line."""
    _, mark, text = line.partition(MARK)
    if not mark:
        return None
    try:
        return NodeFacts(**json.loads(text))
    except (ValueError, TypeError):  # the line was cut, or comes from another version of moe_dist
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvml() -> tuple[int | None, str]:
    """Returns the number of GPUs and the driver's version. If NVML fails, returns None and NVML's error."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return pynvml.nvmlDeviceGetCount(), str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception as error:  # missing package or driver; NVML's errors share no base class with ImportError
        return None, str(error)


def _space(folder: Path) -> tuple[int | None, int | None]:
    """Returns the size of a file system and its number of free bytes for this user; None for unknown values."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None, None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _soft_limit(kind: int) -> int:
    soft, _ = resource.getrlimit(kind)
    return NO_LIMIT if soft == resource.RLIM_INFINITY else soft


def _sees(token_file: tuple[str, str] | None) -> bool | None:
    if token_file is None:
        return None
    with contextlib.suppress(OSError):
        return Path(token_file[0]).read_text() == token_file[1]  # if equal, the node sees the doctor's folder
    return False
