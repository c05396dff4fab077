"""Measures the network between all pairs of nodes, and finds slow nodes and slow pairs.

Each task of the measurement is `python -m launchers.doctor.fabric OPTIONS`; rank 0 prints the result as one line.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_dist.errors import MoeDistError
from moe_dist.parallel.round_robin import Pair, PairExchange, usual
from moe_dist.runtime.environment import PUBLISHED, RankEnv
from moe_dist.runtime.node.check_result import CheckResult, names, note, ok, warning
from moe_dist.runtime.node.facts import node_name
from moe_dist.runtime.rendezvous import StartWait

CHECK = "fabric"
MARK = "moe_dist fabric: "  # begins the line with the result
CPU_BYTES, CUDA_BYTES = 4 << 20, 64 << 20  # number of bytes that each node of a pair sends in an all-to-all
TIMEOUT_SECONDS = 120.0


def judge(
    measured: Mapping[Pair, PairExchange], slow: Sequence[Pair], nodes: Sequence[str], *, payload_bytes: int
) -> list[CheckResult]:
    """Returns a check result for each cause of slow pairs. A cause is a node that is slow with all other nodes, or a single
    slow pair.

    Args:
        measured: For each pair of nodes, the shortest measured time of each collective.
        slow: Pairs that were slow in the first measurement, and again in a second measurement without other traffic.
        nodes: Node names by index.
        payload_bytes: Bytes that each node of a pair sends in an all-to-all.
    """
    if len(nodes) < 2:
        return [note(CHECK, "one node: no pair to measure")]
    rate = _rate(payload_bytes, usual(each.all_to_all for each in measured.values()))
    if not slow:
        few = "; too few pairs to compare" if len(measured) < 3 else ", none twice as slow as the median"
        return [ok(CHECK, f"{len(measured)} pairs of {len(nodes)} nodes{few}: {rate} each way in all-to-all")]
    results, left = [], list(slow)
    for node, name in enumerate(nodes):
        own = [pair for pair in left if node in pair]
        if len(own) == len(nodes) - 1 and len(nodes) > 2:  # with only two nodes, either node could be the slow one
            worst = max(measured[pair].all_to_all for pair in own)
            left = [pair for pair in left if node not in pair]
            text = f"{name} is slow with every other node: down to {_rate(payload_bytes, worst)}, other pairs {rate}"
            exclude = f"exclude it (cluster file: exclude: [{name}])"
            fix = f"check its network card, cable and interface (cluster file), or {exclude}"
            results.append(warning(CHECK, text, fix))
    for first, second in left:
        each = measured[first, second]
        text = (
            f"{names([nodes[first], nodes[second]])} are slow with each other: {_rate(payload_bytes, each.all_to_all)} in "
            f"all-to-all, {each.all_reduce * 1e3:.3g} ms per all-reduce; the median pair has {rate}"
        )
        fix = "check switches and cables between the two, or exclude one (cluster file: exclude: [NAME])"
        results.append(warning(CHECK, text, fix))
    return results


def report_line(
    measured: Mapping[Pair, PairExchange], slow: Sequence[Pair], nodes: Sequence[str], payload_bytes: int
) -> str:
    """Formats the measured times as the line that rank 0 of the measurement prints."""
    pairs = [[*pair, each.all_reduce, each.all_to_all] for pair, each in measured.items()]
    return MARK + json.dumps({"nodes": nodes, "payload_bytes": payload_bytes, "pairs": pairs, "slow": slow})


def read_report(line: str) -> list[CheckResult] | None:
    """Returns the check results for the node pairs in a line of output; None for a line without `MARK`."""
    _, mark, text = line.partition(MARK)
    if not mark:
        return None
    values = json.loads(text)
    measured = {(first, second): PairExchange(*seconds) for first, second, *seconds in values["pairs"]}
    slow = [(first, second) for first, second in values["slow"]]
    return judge(measured, slow, values["nodes"], payload_bytes=values["payload_bytes"])


def measure(folder: Path, device_type: str) -> None:
    """Joins the process group through the shared folder, measures every pair of nodes, and prints the result on rank 0."""
    start = {"MOE_DIST_INIT_METHOD": PUBLISHED, "MOE_DIST_ATTEMPT_ID": folder.name.lstrip(".")}
    env = RankEnv.from_environment({**os.environ, **start})
    import torch  # imported late, because importing torch takes seconds and only the measuring tasks need torch

    from moe_dist.parallel.meeting import meeting
    from moe_dist.parallel.mesh import destroy_world, init_world, own_gpu
    from moe_dist.parallel.pair_bandwidth import NodeRanks, measure_pairs, names_of_nodes

    torch.set_num_threads(1)  # compute threads would disturb the measurement on CPU
    cuda = device_type == "cuda"
    device = own_gpu(env) if cuda else torch.device("cpu")
    with meeting(env, folder, StartWait(env.rank, TIMEOUT_SECONDS)) as (store, _):
        init_world(PUBLISHED, store, rank=env.rank, world_size=env.world_size, device=device, timeout=TIMEOUT_SECONDS)
    per_node = env.local_world_size
    ranks = NodeRanks(env.rank, env.world_size // per_node, per_node)
    payload = CUDA_BYTES if cuda else CPU_BYTES
    nodes = names_of_nodes(node_name(os.environ), ranks, device)
    measured, slow = measure_pairs(ranks, payload_bytes=payload, device=device, timeout=TIMEOUT_SECONDS)
    if env.rank == 0:
        print(report_line(measured, slow, nodes, payload), flush=True)
    destroy_world()  # closes the connections in order, so that no rank logs an error


def _rate(payload_bytes: int, seconds: float) -> str:
    rate = payload_bytes / seconds
    return f"{rate / 1e9:.3g} GB/s" if rate >= 1e9 else f"{rate / 1e6:.3g} MB/s"


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    try:
        measure(Path(options["folder"]), options["device"])
    except MoeDistError as failed:
        print(failed, file=sys.stderr)
        sys.exit(failed.exit_code)
