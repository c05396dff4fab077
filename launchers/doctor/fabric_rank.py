"""One task of the network measurement: `python -m launchers.doctor.fabric_rank OPTIONS`; rank 0 prints the result."""

import json
import os
import sys
from pathlib import Path

from launchers.doctor.probe import report_line
from moe_dist.doctor.node_facts import node_name
from moe_dist.errors import MoeDistError
from moe_dist.runtime.environment import PUBLISHED, RankEnv

CPU_BYTES, CUDA_BYTES = 4 << 20, 64 << 20
TIMEOUT_SECONDS = 120.0


def main(folder: Path, device_type: str) -> None:
    """Joins the process group through the shared folder, measures every pair of nodes, and prints the result on rank 0."""
    meeting = {"MOE_DIST_INIT_METHOD": PUBLISHED, "MOE_DIST_ATTEMPT_ID": folder.name.lstrip(".")}
    env = RankEnv.from_environment({**os.environ, **meeting})
    import torch

    from moe_dist.parallel.mesh import destroy_world, init_world
    from moe_dist.parallel.pair_bandwidth import NodeRanks, measure_pairs, names_of_nodes
    from moe_dist.parallel.rendezvous import published_store

    torch.set_num_threads(1)  # compute threads would disturb the measurement on CPU
    cuda = device_type == "cuda"
    device = torch.device("cuda", env.local_rank if torch.cuda.device_count() > 1 else 0) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    with published_store(env, folder, timeout=TIMEOUT_SECONDS) as store:
        init_world(PUBLISHED, store, rank=env.rank, world_size=env.world_size, device=device, timeout=TIMEOUT_SECONDS)
    per_node = env.local_world_size
    ranks = NodeRanks(env.rank, env.world_size // per_node, per_node)
    payload = CUDA_BYTES if cuda else CPU_BYTES
    names = names_of_nodes(node_name(os.environ), ranks, device)
    measured, slow = measure_pairs(ranks, payload_bytes=payload, device=device, timeout=TIMEOUT_SECONDS)
    if env.rank == 0:
        print(report_line(measured, slow, names, payload), flush=True)
    destroy_world()  # closes the connections in order, so that no rank logs an error


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    try:
        main(Path(options["folder"]), options["device"])
    except MoeDistError as failed:
        print(failed, file=sys.stderr)
        sys.exit(failed.exit_code)
