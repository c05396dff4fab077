"""Logs the place and environment of each task of a job, without torch. Start this script in place of the training program:

python -m launchers.slurm CONFIG --program slurm/probe.py && grep -h '^probe' <run folder>/log/rank_*.log
"""

import json
import os
import sys

place = json.loads(os.environ["MOE_DIST_PLACE"])
found = {
    "rank": os.environ["RANK"],
    "local_rank": os.environ["LOCAL_RANK"],
    "host": os.environ["SLURMD_NODENAME"],
    "cuda": os.environ.get("CUDA_VISIBLE_DEVICES", "-"),
    "features": os.environ["MOE_DIST_NODE_FEATURES"],
    "groups": "+".join(place["groups"]) or "-",
    "master": os.environ["MASTER_ADDR"],
}
print("probe", *(f"{name}={value}" for name, value in found.items()), file=sys.stderr)
