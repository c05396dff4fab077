"""What one node is and can do, found out on it, and the line of JSON in which it says so.

Imports no torch: versions are those of the installed packages, and the whole takes a second or two.
"""

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
from typing import Any

MARK = "moe_dist node facts: "  # before the JSON, so that the line is found among what a prelude prints
CONNECT_SECONDS = 5.0
INFINIBAND = Path("/sys/class/infiniband")
NO_LIMIT = -1


@dataclass(frozen=True)
class Questions:
    """What a node is asked.

    Attributes:
        folder: run.root; every node must be able to write there.
        data: data.path.
        token_file: A file that whoever asks has put into `folder`, and what is in it; None for none.
        hosts: Names that the node must be able to resolve: where the ranks meet.
        meeting: Path of the file by which the nodes find the first of them, see `meeting.py`; None for no meeting.
        num_nodes: That come to it.
    """

    folder: str
    data: str
    token_file: tuple[str, str] | None = None
    hosts: tuple[str, ...] = ()
    meeting: str | None = None
    num_nodes: int = 1


@dataclass(frozen=True)
class NodeFacts:
    """The answers. None stands for what could not be found out.

    Attributes:
        node: Name, as the scheduler has it.
        clock: Unix seconds when it answered.
        versions: Of Python and of packages; None where one is not installed.
        apex: 'nvidia', 'other' for the unrelated package of that name, or 'none'.
        gpus: Number that NVML shows; None where there is no NVML.
        driver: Version of NVIDIA's driver, or why NVML does not work.
        shm_bytes: Size of /dev/shm.
        open_files, locked_memory: Soft limits; NO_LIMIT for none.
        infiniband: Whether it has such cards.
        folder_problem: Why a file cannot be written and read back in the folder; empty where it can.
        free_bytes: Room in the folder, for this user.
        sees_token: Whether it sees the file of whoever asks; None where none was put there.
        sees_data: Whether data.path is there.
        unresolved: Names that do not resolve, with the resolver's words.
        unreachable: Why the first node does not answer; empty where it does, or was not asked.
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


def look(questions: Questions, *, env: Mapping[str, str] = os.environ) -> NodeFacts:
    """Answers on this node."""
    folder = Path(questions.folder)
    gpus, driver = _nvml()
    return NodeFacts(
        node=node_name(env),
        clock=time.time(),
        versions=versions(),
        apex=apex_kind(),
        gpus=gpus,
        driver=driver,
        shm_bytes=_size("/dev/shm"),
        open_files=_soft_limit(resource.RLIMIT_NOFILE),
        locked_memory=_soft_limit(resource.RLIMIT_MEMLOCK),
        infiniband=INFINIBAND.is_dir() and any(INFINIBAND.iterdir()),
        folder_problem=write_problem(folder),
        free_bytes=_free(folder),
        sees_token=_sees(questions.token_file),
        sees_data=Path(questions.data).exists(),
        unresolved=unresolved(questions.hosts),
    )


def node_name(env: Mapping[str, str]) -> str:
    """As the scheduler calls this node; without one its host name."""
    return env.get("SLURMD_NODENAME") or env.get("MOE_DIST_NODE_NAME") or socket.gethostname()


def versions() -> dict[str, str | None]:
    """Versions of what must be the same on all nodes. NCCL comes as a package of its own beside torch; a torch that was
    built with another one, or on the CPU, has none."""
    found = {name: _version(name) for name in ("torch", "moe_dist")}
    nccl = next((v for name in ("nvidia-nccl-cu13", "nvidia-nccl-cu12") if (v := _version(name)) is not None), None)
    return {"python": platform.python_version(), **found, "nccl": nccl}


def apex_kind() -> str:
    """Which package answers to `import apex`, without importing it."""
    try:
        spec = importlib.util.find_spec("apex")
    except (ImportError, ValueError):
        return "other"
    if spec is None:
        return "none"
    folders = spec.submodule_search_locations or ()
    return "nvidia" if any((Path(f) / "optimizers" / "fused_adam.py").is_file() for f in folders) else "other"


def write_problem(folder: Path) -> str:
    """Why a file cannot be written and read back there; empty where it can. A folder that is not there yet is judged by the
    nearest one above it."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        return f"{there}: {os.strerror(errno.ENOTDIR)}"
    folder = nearest(folder)
    path, content = folder / f".doctor-{secrets.token_hex(8)}", secrets.token_bytes(4096)
    try:
        path.write_bytes(content)
        read = path.read_bytes()
        path.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return f"{folder}: {error.strerror or error}"
    return "" if read == content else f"{folder}: what was written is not what is read back"


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def unresolved(hosts: Iterable[str]) -> dict[str, str]:
    """The names that do not resolve here, each with the resolver's words."""
    found = {}
    for host in hosts:
        try:
            socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            found[host] = error.strerror or str(error)
    return found


def unreachable(host: str, port: int) -> str:
    """Why nobody answers there; empty where somebody does."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def to_line(facts: NodeFacts) -> str:
    """One line, to be found by `from_lines`."""
    return MARK + json.dumps(asdict(facts), separators=(",", ":"))


def from_line(line: str) -> NodeFacts | None:
    """The facts in a line of output; None where it holds none."""
    _, mark, text = line.partition(MARK)
    if not mark:
        return None
    try:
        return NodeFacts(**json.loads(text))
    except (ValueError, TypeError):
        return None


def questions_from(text: str) -> Questions:
    """From the JSON that `json.dumps(asdict(questions))` gives."""
    values: dict[str, Any] = json.loads(text)
    pairs = {name: tuple(values[name]) for name in ("token_file", "hosts") if values.get(name) is not None}
    return Questions(**{**values, **pairs})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvml() -> tuple[int | None, str]:
    """Number of GPUs and the driver's version; or None and why."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return pynvml.nvmlDeviceGetCount(), str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception as error:  # no package, no driver: NVML's errors share no base with ImportError
        return None, str(error)


def _size(folder: str) -> int | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def _free(folder: Path) -> int | None:
    try:
        found = os.statvfs(nearest(folder))
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _soft_limit(kind: int) -> int:
    soft, _ = resource.getrlimit(kind)
    return NO_LIMIT if soft == resource.RLIM_INFINITY else soft


def _sees(token_file: tuple[str, str] | None) -> bool | None:
    if token_file is None:
        return None
    with contextlib.suppress(OSError):
        return Path(token_file[0]).read_text() == token_file[1]
    return False
