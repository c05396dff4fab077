"""Checks the facts of each node, and compares the nodes with each other. All functions are pure and import no torch. The
doctor's probe job and the start of every run call them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moe_dist.errors import ConfigError
from moe_dist.runtime.node.check_result import CheckResult, error, names, note, ok, warning
from moe_dist.runtime.node.facts import NO_LIMIT, NodeFacts

CLOCK_SECONDS = 5.0
SHM_BYTES_PER_RANK = 64 << 20  # NCCL's buffers need it in /dev/shm, which in many containers has only 64 MiB in total
# Number of files that a rank opens: two connections to each other rank in each of four process groups (world, EP, edp,
# checkpoint), and OWN_FILES for Python.
FILES_PER_PEER, OWN_FILES = 8, 256
PACKAGES = ("python", "torch", "nccl", "moe_dist")


@dataclass(frozen=True)
class Needs:
    """What a run requires of its nodes.

    Attributes:
        ranks_per_node: Largest number of ranks on one node.
        gpus_per_node: Largest number of GPUs that the run uses on one node; 0 for a run on CPUs.
        folder_bytes: Number of bytes that the run writes to run.root.
        folder, data: The paths run.root and data.path, for messages.
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
    """Runs all checks. Returns one result for each check, over all nodes.

    Args:
        heard: For each node, the time of its answer in Unix seconds of this host's clock; None skips the check of clocks.
        here: Facts of the node that submits the job. Only its folders are checked.
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
    """Checks folders and free space, also on a login node."""
    return [_folder(nodes, needs), _room(nodes, needs), _data(nodes, needs)]


def check_cores(nodes: Sequence[NodeFacts], needs: Needs) -> CheckResult:
    """Checks that a node has a core for each rank. Skipped at the start of a run, because a scheduler may already have
    bound each rank to different cores."""
    ranks, known = needs.ranks_per_node, [(n.cores, n) for n in nodes if n.cores is not None]
    if not known:
        return note("cores", "the number of cores is unknown")
    if few := [(cores, n) for cores, n in known if cores < ranks]:
        text = (
            f"{_named([n for _, n in few])} has {few[0][0]} cores for {ranks} ranks, so ranks take turns and steps are slow"
        )
        fix = "lower parallel.ep or parallel.edp, or ranks_per_node in the cluster file, or take nodes with more cores"
        return warning("cores", text, fix)
    return ok("cores", f"{min(cores for cores, _ in known)} or more for {ranks} ranks on {_all(nodes)}")


def _resolve(nodes: Sequence[NodeFacts]) -> CheckResult:
    broken = {host: [n for n in nodes if host in n.unresolved] for n in nodes for host in n.unresolved}
    if not broken:
        return ok("rendezvous host", f"resolves on {_all(nodes)}")
    host, where = next(iter(broken.items()))
    others = f" (and {len(broken) - 1} other names)" if len(broken) > 1 else ""
    text = f"{host!r}{others} does not resolve on {_named(where)}: {where[0].unresolved[host]}"
    fix = "enter it in the DNS or /etc/hosts of that node, or set MOE_DIST_RENDEZVOUS_HOST to an address of rank 0's node"
    return error("rendezvous host", text, fix, kind=ConfigError)


def _ports(nodes: Sequence[NodeFacts]) -> CheckResult:
    cut_off = [n for n in nodes if n.unreachable and not n.unresolved]  # `_resolve` reports unresolved names
    if len(nodes) == 1:
        return note("ports", "one node: its ranks connect on the loopback or through a file")
    if not cut_off:
        return ok("ports", f"{_all(nodes)} can connect to a free port of rank 0's node")
    text = f"{_named(cut_off)} cannot connect to a free port of rank 0's node: {cut_off[0].unreachable}"
    fix = "open the ports between the nodes of a job (docs/security.md), or correct `interface` in the cluster file"
    return error("ports", text, fix)


def _folder(nodes: Sequence[NodeFacts], needs: Needs) -> CheckResult:
    broken = [n for n in nodes if n.folder_problem]
    blind = [n for n in nodes if n.sees_token is False and not n.folder_problem]
    if broken:
        text = f"run.root={needs.folder!r} cannot be written on {_named(broken)}: {broken[0].folder_problem}"
        fix = "repair the mount or its permissions there, or choose another run.root"
        return error("shared folder", text, fix, kind=ConfigError)
    if blind:
        text = f"run.root={needs.folder!r} is a different folder on {_named(blind)}: it lacks a file written from here"
        fix = "choose a run.root on a file system that all nodes mount, as an absolute path"
        return error("shared folder", text, fix, kind=ConfigError)
    return ok("shared folder", f"run.root={needs.folder!r} can be written on {_all(nodes)}")


def _room(nodes: Sequence[NodeFacts], needs: Needs) -> CheckResult:
    known = [n for n in nodes if n.free_bytes is not None and not n.folder_problem]  # `_folder` reports such problems
    if not known:
        return note("room", f"run.root={needs.folder!r}: the free space is unknown")
    least = min(known, key=lambda n: n.free_bytes or 0)
    free = least.free_bytes or 0  # the smallest value of all nodes; all should be equal, because they see one file system
    if free >= needs.folder_bytes:
        return ok("room", f"{_bytes(free)} free in run.root; the checkpoints need {_bytes(needs.folder_bytes)}")
    need = _bytes(needs.folder_bytes)
    text = f"run.root={needs.folder!r} has {_bytes(free)} free on {least.node}, but the checkpoints need {need}"
    return warning("room", text, "free space, choose another run.root, or keep fewer checkpoints (checkpoint.keep)")


def _data(nodes: Sequence[NodeFacts], needs: Needs) -> CheckResult:
    without = [n for n in nodes if not n.sees_data]
    if not without:
        return ok("data", f"data.path={needs.data!r} exists on {_all(nodes)}")
    text = f"data.path={needs.data!r} does not exist on {_named(without)}"
    fix = "put the data on a file system that all nodes mount, and use its absolute path"
    return error("data", text, fix, kind=ConfigError)


def answered_at(clock: float, *, asked: float, seen: float) -> float:
    """Estimates the time of a node's answer by this host's clock: the node's own time, limited to the interval between
    request and arrival. A slow answer is thus no clock error, but a clock error below the delay goes unnoticed."""
    return min(max(clock, asked), seen)


def _clocks(nodes: Sequence[NodeFacts], heard: Sequence[float]) -> CheckResult:
    off = {n.node: n.clock - at for n, at in zip(nodes, heard, strict=True)}  # seconds by which a node's clock is ahead
    wrong = {node: seconds for node, seconds in off.items() if abs(seconds) > CLOCK_SECONDS}
    if not wrong:
        return ok("clocks", f"the clocks of {_all(nodes)} agree within {CLOCK_SECONDS:g} s")
    node, seconds = max(wrong.items(), key=lambda each: abs(each[1]))
    text = f"{names(sorted(wrong))}: off by {seconds:+.0f} s ({node})"
    fix = "synchronise its clock (chrony or ntpd); until then times in logs are wrong and access tokens may be rejected"
    return warning("clocks", text, fix)


def _versions(nodes: Sequence[NodeFacts]) -> CheckResult:
    """Compares versions, because ranks with different versions may hang or compute different results."""
    differing = []
    for package in PACKAGES:
        by_version = _grouped(nodes, lambda n, p=package: n.versions.get(p) or "none")
        if len(by_version) > 1:
            ordered = sorted(by_version.items(), key=lambda each: -len(each[1]))  # the most frequent version first
            differing.append(f"{package} " + ", ".join(f"{version} on {_named(on)}" for version, on in ordered))
    if differing:
        fix = "use one environment on all nodes: by the cluster file's prelude or container, or on a shared file system"
        return error("versions", "; ".join(differing), fix)
    versions = nodes[0].versions
    if versions.get("torch") is None:
        text = f"torch is not installed on {_all(nodes)}"
        fix = "activate the Python environment in the cluster file's prelude, or before the command"
        return error("versions", text, fix)
    shown = ", ".join(f"{package} {version}" for package in PACKAGES if (version := versions.get(package)))
    return ok("versions", f"{shown} on {_all(nodes)}")


def _apex(nodes: Sequence[NodeFacts]) -> CheckResult:
    wrong = [n for n in nodes if n.apex == "other"]
    if wrong:
        text = f"the package `apex` on {_named(wrong)} is not NVIDIA Apex but an unrelated package"
        fix = "pip uninstall apex; NVIDIA Apex is optional and must be built from its repository"
        return warning("apex", text, fix)
    kinds = _grouped(nodes, lambda n: n.apex)
    if len(kinds) > 1:
        text = f"NVIDIA Apex is installed on {_named(kinds['nvidia'])}, but not on {_named(kinds['none'])}"
        fix = "install it on all nodes, or set optimizer.backend=torch"
        return warning("apex", text, fix)
    return ok("apex", "NVIDIA Apex is installed" if "nvidia" in kinds else "not installed: torch's fused optimizer is used")


def _gpus(nodes: Sequence[NodeFacts], needs: Needs) -> list[CheckResult]:
    if not needs.gpus_per_node:
        return []
    blind = [n for n in nodes if n.gpus is None]
    few = [n for n in nodes if n.gpus is not None and n.gpus < needs.gpus_per_node]
    if few:
        text = f"{_named(few)} has {few[0].gpus} GPUs, but the plan puts {needs.gpus_per_node} ranks there"
        return [error("GPUs", text, "request nodes with more GPUs (cluster file: gpus), or use fewer ranks per node")]
    if blind:
        fix = "install nvidia-ml-py and check the driver (nvidia-smi); without NVML there are no GPU metrics"
        return [warning("GPUs", f"NVML does not answer on {_named(blind)}: {blind[0].driver}", fix)]
    drivers = _grouped(nodes, lambda n: n.driver)
    if len(drivers) > 1:
        text = ", ".join(f"{driver} on {_named(on)}" for driver, on in drivers.items())
        return [warning("GPUs", f"drivers differ: {text}", "install the same driver on all nodes")]
    return [ok("GPUs", f"NVML finds {needs.gpus_per_node} or more on {_all(nodes)}, driver {nodes[0].driver}")]


def _shm(nodes: Sequence[NodeFacts], needs: Needs) -> CheckResult:
    need = SHM_BYTES_PER_RANK * needs.ranks_per_node
    small = [n for n in nodes if n.shm_bytes is not None and n.shm_bytes < need] if needs.ranks_per_node > 1 else []
    if not small:
        return ok("/dev/shm", f"large enough for {needs.ranks_per_node} ranks on {_all(nodes)}")
    text = f"{_bytes(small[0].shm_bytes or 0)} on {_named(small)}, but {needs.ranks_per_node} ranks need {_bytes(need)}"
    fix = "enlarge it: --shm-size of a container, or mount -o remount,size=..."
    return warning("/dev/shm", text, fix)


def _files(nodes: Sequence[NodeFacts], needs: Needs) -> CheckResult:
    need = OWN_FILES + FILES_PER_PEER * needs.world_size  # enough if every rank connects to all others
    low = [n for n in nodes if n.open_files != NO_LIMIT and n.open_files < need]
    if not low:
        return ok("open files", f"the limit is high enough for {needs.world_size} ranks on {_all(nodes)}")
    text = f"the limit is {low[0].open_files} on {_named(low)}, but a rank of {needs.world_size} may open {need}"
    fix = f"put ulimit -n {need} into the cluster file's prelude, or raise the limit in limits.conf"
    return warning("open files", text, fix)


def _locked_memory(nodes: Sequence[NodeFacts], needs: Needs) -> list[CheckResult]:
    """Checks the limit on locked memory, because memory that is registered for InfiniBand counts as locked."""
    if not needs.gpus_per_node or needs.num_nodes < 2:
        return []
    low = [n for n in nodes if n.infiniband and n.locked_memory != NO_LIMIT]  # without InfiniBand no memory is registered
    if not low:
        return []
    text = f"the limit on {_named(low)} is {_bytes(low[0].locked_memory)}; InfiniBand needs no limit"
    fix = "put ulimit -l unlimited into the prelude, or set it in limits.conf and for the scheduler's daemon"
    return [warning("locked memory", text, fix)]


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
    """Formats a number of bytes with three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"
