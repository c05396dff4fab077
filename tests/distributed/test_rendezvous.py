"""Ranks meet at a published address. Also tests which ports listen while they run, and afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.command import PUBLISHED_RENDEZVOUS
from moe_dist.runtime.rendezvous import address_file

ROOT = Path(__file__).parents[2]
RANK = """
import json, os, sys
from pathlib import Path
import psutil, torch
import torch.distributed as dist
from moe_dist.parallel.mesh import destroy_world, init_world
from moe_dist.parallel.meeting import meeting
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.rendezvous import StartWait
def listening():
    return sorted(c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN)
env = RankEnv.from_environment(os.environ)
with meeting(env, Path(sys.argv[1]), StartWait(env.rank, 600.0)) as (store, _):
    init_world(env.init_method, store, rank=env.rank, world_size=env.world_size, device=torch.device("cpu"), timeout=600.0)
    del store
value = torch.tensor([2.0 ** env.rank])
dist.all_reduce(value)
during = listening()
dist.barrier()
destroy_world()
print(json.dumps({"sum": value.item(), "during": during, "after": listening()}))
"""


@pytest.mark.full
def test_ranks_meet_and_nothing_listens_but_on_the_loopback_and_nothing_after(tmp_path: Path) -> None:
    stale = {"attempt_id": "this.0", "host": "127.0.0.1", "port": 9, "secret": "x"}
    address_file(tmp_path).write_text(json.dumps(stale))
    address_file(tmp_path).chmod(0o600)
    shared = {
        **os.environ,
        **PUBLISHED_RENDEZVOUS,
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "3",
        "MOE_DIST_ATTEMPT_ID": "this.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (2, 1, 0)  # rank 0 starts last, so the others first see the stale file
    ]
    try:
        results = []
        for rank in ranks:
            out, err = rank.communicate(timeout=600)
            assert rank.returncode == 0, err
            results.append(json.loads(out))
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    for result in results:
        assert result["sum"] == 7.0
        assert set(result["during"]) == {"127.0.0.1"}
        assert result["after"] == []
    assert list(tmp_path.iterdir()) == []
