"""Judges what nodes say about themselves, each for itself and against each other. Pure functions, no torch.

The same checks run from the login node (on facts that a probe job brings back) and in the job itself, before it trains.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moe_dist.doctor.check_result import CheckResult, error, names, note, ok, warning
from moe_dist.doctor.node_facts import NO_LIMIT, NodeFacts
from moe_dist.errors import ConfigError

CLOCK_SECONDS = 5.0
SHM_BYTES_PER_RANK = 64 << 20  # NCCL's buffers between two ranks of a node, with room; containers often have 64 MiB in all
# Connections of a rank: to each peer in the world, EP, edp and checkpoint groups, twice over; and what Python holds itself.
FILES_PER_PEER, OWN_FILES = 8, 256
PACKAGES = ("python", "torch", "nccl", "moe_dist")


@dataclass(frozen=True)
class Needs:
    """What a run asks of its nodes.

    Attributes:
        world_size: Ranks of the run.
        ranks_per_node: The most on one node.
        gpus_per_node: Likewise; 0 where it computes on the CPU.
        num_nodes: Nodes of the run.
        folder_bytes: Room that run.root needs.
        folder, data: run.root and data.path, to be named.
    """

    world_size: int
    ranks_per_node: int
    gpus_per_node: int
    num_nodes: int
    folder_bytes: int
    folder: str
    data: str


def check_nodes(
    nodes: Sequence[NodeFacts], needs: Needs, heard: Sequence[float] | None = None, *, here: NodeFacts | None = None
) -> list[CheckResult]:
    """One line a check over all nodes.

    Args:
        nodes: Their facts.
        heard: When each answered by one and the same clock, to hold their clocks against; None leaves that out.
        here: What the node says from which the job is submitted: only its folders count.
    """
    if not nodes:
        return check_folders([here], needs) if here is not None else []
    return [
        _resolve(nodes),
        _ports(nodes),
        *check_folders([*([here] if here is not None else []), *nodes], needs),
        *([_clocks(nodes, heard)] if heard is not None else []),
        _versions(nodes),
        _apex(nodes),
        *_gpus(nodes, needs),
        _shm(nodes, needs),
        _files(nodes, needs),
        *_locked_memory(nodes, needs),
    ]


def check_folders(nodes: Sequence[NodeFacts], needs: Needs) -> list[CheckResult]:
    """What a login node can tell as well: folders, and the room in them."""
    return [_folder(nodes, needs), _room(nodes, needs), _data(nodes, needs)]


def _resolve(nodes: Sequence[NodeFacts]) -> CheckResult:
    broken = {host: [n for n in nodes if host in n.unresolved] for n in nodes for host in n.unresolved}
    if not broken:
        return ok("rendezvous host", f"resolves on {_all(nodes)}")
    host, where = next(iter(broken.items()))
    others = f" (and {len(broken) - 1} other names)" if len(broken) > 1 else ""
    return error(
        "rendezvous host",
        f"{host!r}{others} does not resolve on {_named(where)}: {where[0].unresolved[host]}",
        "enter it in the DNS or /etc/hosts of that node, or set MOE_DIST_RENDEZVOUS_HOST to an address of rank 0's node",
        kind=ConfigError,
    )


def _ports(nodes: Sequence[NodeFacts]) -> CheckResult:
    # A name that does not resolve is `_resolve`'s line.
    cut_off = [n for n in nodes if n.unreachable and not n.unresolved]
    if len(nodes) == 1:
        return note("ports", "one node: its ranks meet on the loopback, or in a file")
    if not cut_off:
        return ok("ports", f"a free port of rank 0's node can be reached from {_all(nodes)}")
    return error(
        "ports",
        f"{_named(cut_off)} cannot connect to a free port of rank 0's node: {cut_off[0].unreachable}",
        "open the ports between the nodes of a job (docs/security.md), or name the right interface in the cluster file",
    )


def _folder(nodes: Sequence[NodeFacts], needs: Needs) -> CheckResult:
    broken = [n for n in nodes if n.folder_problem]
    blind = [n for n in nodes if n.sees_token is False and not n.folder_problem]
    if broken:
        return error(
            "shared folder",
            f"run.root={needs.folder!r} cannot be written on {_named(broken)}: {broken[0].folder_problem}",
            "mend the mount or its permissions there, or choose another run.root",
            kind=ConfigError,
        )
    if blind:
        return error(
            "shared folder",
            f"run.root={needs.folder!r} is another folder on {_named(blind)}: a file written there from here is not seen",
            "choose a run.root on a file system that all nodes mount, as an absolute path",
            kind=ConfigError,
        )
    return ok("shared folder", f"run.root={needs.folder!r} can be written on {_all(nodes)}")


def _room(nodes: Sequence[NodeFacts], needs: Needs) -> CheckResult:
    known = [n for n in nodes if n.free_bytes is not None and not n.folder_problem]  # else that is `_folder`'s line
    if not known:
        return note("room", f"run.root={needs.folder!r}: nobody says how much is free there")
    least = min(known, key=lambda n: n.free_bytes or 0)
    free = least.free_bytes or 0
    if free >= needs.folder_bytes:
        return ok("room", f"{_bytes(free)} free in run.root, its checkpoints need {_bytes(needs.folder_bytes)}")
    return warning(
        "room",
        f"run.root={needs.folder!r} has {_bytes(free)} free on {least.node}, and its checkpoints need "
        f"{_bytes(needs.folder_bytes)}",
        "make room, choose another run.root, or keep fewer (checkpoint.keep)",
    )


def _data(nodes: Sequence[NodeFacts], needs: Needs) -> CheckResult:
    without = [n for n in nodes if not n.sees_data]
    if not without:
        return ok("data", f"data.path={needs.data!r} is there on {_all(nodes)}")
    return error(
        "data",
        f"data.path={needs.data!r} is not there on {_named(without)}",
        "put the data on a file system that all nodes mount, and name it by its absolute path",
        kind=ConfigError,
    )


def answered_at(clock: float, *, asked: float, seen: float) -> float:
    """When a node answered, by our clock: the moment nearest to what its own said, after it was asked and before its answer
    was seen. What lies between, a slow start or a busy machine, is no fault of its clock; one that is behind by less than
    that goes unnoticed."""
    return min(max(clock, asked), seen)


def _clocks(nodes: Sequence[NodeFacts], heard: Sequence[float]) -> CheckResult:
    off = {n.node: n.clock - at for n, at in zip(nodes, heard, strict=True)}
    wrong = {node: seconds for node, seconds in off.items() if abs(seconds) > CLOCK_SECONDS}
    if not wrong:
        return ok("clocks", f"of {_all(nodes)} agree within {CLOCK_SECONDS:g} s")
    node, seconds = max(wrong.items(), key=lambda each: abs(each[1]))
    return warning(
        "clocks",
        f"{names(sorted(wrong))}: off by {seconds:+.0f} s ({node})",
        "set its clock (chrony or ntpd); log files and ages are wrong until then, and tokens may be refused",
    )


def _versions(nodes: Sequence[NodeFacts]) -> CheckResult:
    """Equal everywhere: ranks of different versions may disagree on a wire format or a bit, or hang."""
    differing = []
    for package in PACKAGES:
        by_version = _grouped(nodes, lambda n, p=package: n.versions.get(p) or "none")
        if len(by_version) > 1:
            ordered = sorted(by_version.items(), key=lambda each: -len(each[1]))
            differing.append(f"{package} " + ", ".join(f"{version} on {_named(on)}" for version, on in ordered))
    if differing:
        return error(
            "versions",
            "; ".join(differing),
            "give all nodes one environment: in the cluster file's prelude or container, or on a shared file system",
        )
    versions = nodes[0].versions
    if versions.get("torch") is None:
        return error(
            "versions",
            f"torch is not installed on {_all(nodes)}",
            "activate the environment in the cluster file's prelude, or start from it",
        )
    shown = ", ".join(f"{package} {version}" for package in PACKAGES if (version := versions.get(package)))
    return ok("versions", f"{shown} on {_all(nodes)}")


def _apex(nodes: Sequence[NodeFacts]) -> CheckResult:
    wrong = [n for n in nodes if n.apex == "other"]
    if wrong:
        return warning(
            "apex",
            f"the package `apex` on {_named(wrong)} is not NVIDIA's but an unrelated one of that name",
            "pip uninstall apex; NVIDIA Apex is built from its repository, and is not needed",
        )
    kinds = _grouped(nodes, lambda n: n.apex)
    if len(kinds) > 1:
        return warning(
            "apex",
            f"NVIDIA Apex is installed on {_named(kinds['nvidia'])}, and not on {_named(kinds['none'])}",
            "install it everywhere, or set optimizer.backend=torch",
        )
    return ok("apex", "NVIDIA Apex is installed" if "nvidia" in kinds else "not installed: torch's fused optimizer is used")


def _gpus(nodes: Sequence[NodeFacts], needs: Needs) -> list[CheckResult]:
    if not needs.gpus_per_node:
        return []
    blind = [n for n in nodes if n.gpus is None]
    few = [n for n in nodes if n.gpus is not None and n.gpus < needs.gpus_per_node]
    if few:
        text = f"{_named(few)} shows {few[0].gpus} GPUs, the plan puts {needs.gpus_per_node} ranks there"
        return [error("GPUs", text, "ask for nodes with more (cluster file: gpus), or for fewer ranks a node")]
    if blind:
        fix = "install nvidia-ml-py and look at the driver (nvidia-smi); without it nothing shows what the GPUs do"
        return [warning("GPUs", f"NVML does not answer on {_named(blind)}: {blind[0].driver}", fix)]
    drivers = _grouped(nodes, lambda n: n.driver)
    if len(drivers) > 1:
        text = ", ".join(f"{driver} on {_named(on)}" for driver, on in drivers.items())
        return [warning("GPUs", f"drivers differ: {text}", "bring the nodes to one driver")]
    return [ok("GPUs", f"NVML shows {needs.gpus_per_node} or more on {_all(nodes)}, driver {nodes[0].driver}")]


def _shm(nodes: Sequence[NodeFacts], needs: Needs) -> CheckResult:
    need = SHM_BYTES_PER_RANK * needs.ranks_per_node
    small = [n for n in nodes if n.shm_bytes is not None and n.shm_bytes < need] if needs.ranks_per_node > 1 else []
    if not small:
        return ok("/dev/shm", f"large enough for {needs.ranks_per_node} ranks on {_all(nodes)}")
    return warning(
        "/dev/shm",
        f"{_bytes(small[0].shm_bytes or 0)} on {_named(small)}, {needs.ranks_per_node} ranks want {_bytes(need)}",
        "enlarge it: --shm-size of a container, or mount -o remount,size=...",
    )


def _files(nodes: Sequence[NodeFacts], needs: Needs) -> CheckResult:
    need = OWN_FILES + FILES_PER_PEER * needs.world_size
    low = [n for n in nodes if n.open_files != NO_LIMIT and n.open_files < need]
    if not low:
        return ok("open files", f"the limit is high enough for {needs.world_size} ranks on {_all(nodes)}")
    return warning(
        "open files",
        f"{low[0].open_files} on {_named(low)}, a rank among {needs.world_size} may open {need}",
        f"ulimit -n {need} in the cluster file's prelude, or a higher limit in limits.conf",
    )


def _locked_memory(nodes: Sequence[NodeFacts], needs: Needs) -> list[CheckResult]:
    """Only where it matters: GPUs that send through InfiniBand register their memory, which counts as locked."""
    if not needs.gpus_per_node or needs.num_nodes < 2:
        return []
    low = [n for n in nodes if n.infiniband and n.locked_memory != NO_LIMIT]
    if not low:
        return []
    text = f"the limit on {_named(low)} is {_bytes(low[0].locked_memory)}; InfiniBand wants none"
    return [
        warning("locked memory", text, "ulimit -l unlimited in the prelude, or in limits.conf and the scheduler's daemon")
    ]


def _grouped(nodes: Sequence[NodeFacts], key: Callable[[NodeFacts], str]) -> Mapping[str, list[NodeFacts]]:
    groups: dict[str, list[NodeFacts]] = {}
    for node in nodes:
        groups.setdefault(key(node), []).append(node)
    return groups


def _named(nodes: Sequence[NodeFacts]) -> str:
    return names([node.node for node in nodes])


def _all(nodes: Sequence[NodeFacts]) -> str:
    return nodes[0].node if len(nodes) == 1 else f"all {len(nodes)} nodes"


def _bytes(number: float) -> str:
    """With three digits and the unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"
