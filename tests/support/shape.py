"""The shape of a test cluster, drawn from a seed, so that tests hold on sites that nobody thought of.

CLUSTER_SEED fixes the seed. The tests print it: the same seed gives the same shape.
"""

import os
import random
from dataclasses import dataclass
from functools import cache

SEED = "CLUSTER_SEED"
# The names of four nodes, in Slurm's order.
NAMES = (
    ("node1", "node2", "node3", "node4"),
    ("gpu-a", "gpu-b", "gpu-c", "gpu-d"),
    ("nid000009", "nid000010", "nid000011", "nid000012"),
    ("n8", "n9", "n10", "n11"),
    ("r1n2", "r1n14", "r2n3", "r2n15"),
    ("Z-front", "a100x01", "m42", "tesla"),
)


@dataclass(frozen=True)
class Shape:
    """A cluster as a site may have it.

    Attributes:
        seed: The seed of this shape.
        names: Names of the four nodes, in Slurm's order.
        domain: DNS domain in the host name of each node; Slurm leaves it out.
        partition, urgent: Names of the default partition and of the one that preempts it.
        preemption: PreemptMode of the default partition.
        cpus: CPUs that each node claims.
        threads: Who gives each rank one thread: `key` (cpus_per_rank of the cluster file), `user` (OMP_NUM_THREADS in the
            environment of the submission) or `cores` (the job's cores on the node).
        signal_seconds: Of the cluster file.
        time: Time limit, in one of Slurm's forms; always 30 minutes.
        silent_seconds: Slurm declares a node down after this time without an answer.
        skew: Seconds by which each node starts late.
        network: First three bytes of the addresses of Ray's nodes.
    """

    seed: int
    names: tuple[str, ...]
    domain: str
    partition: str
    urgent: str
    preemption: str
    cpus: int
    threads: str
    signal_seconds: int
    time: str
    silent_seconds: int
    skew: tuple[int, ...]
    network: str

    @classmethod
    def draw(cls, seed: int) -> "Shape":
        rng = random.Random(seed)
        partition, urgent = rng.sample(("main", "batch", "gpu-long", "debug", "A100_80", "0short"), 2)
        return cls(
            seed=seed,
            names=rng.choice(NAMES),
            domain=rng.choice(("", ".hpc.example")),
            partition=partition,
            urgent=urgent,
            preemption=rng.choice(("REQUEUE", "CANCEL")),
            cpus=rng.choice((8, 9, 12)),
            threads=rng.choice(("key", "user", "cores")),
            signal_seconds=rng.choice((60, 75, 120)),
            time=rng.choice(("30", "30:00", "0:30:00", "0-0:30")),
            silent_seconds=rng.choice((10, 20)),
            skew=tuple(rng.choice((0, 0, 2, 6)) for _ in range(4)),
            network=rng.choice(("127.0.0", "127.9.0", "127.0.31")),
        )

    def variables(self) -> dict[str, str]:
        """Settings of slurm_cluster.sh, and the environment of those who submit jobs."""
        settings = {
            "NAMES": " ".join(self.names),
            "DOMAIN": self.domain,
            "PARTITION": self.partition,
            "URGENT": self.urgent,
            "PREEMPT": self.preemption,
            "CPUS": str(self.cpus),
            "NODE_TIMEOUT": str(self.silent_seconds),
        }
        user = {"OMP_NUM_THREADS": "1"} if self.threads == "user" else {}
        return {f"SLURM_CI_{name}": value for name, value in settings.items()} | user

    def site(self, *, ranks_per_node: int = 1, equal_threads: bool = False, **keys: object) -> str:
        """Returns the text of a cluster file. `keys` replace or add lines. With `equal_threads` a rank has one thread in
        every job: an exclusive job has all cores of its nodes, another job has one core for each rank."""
        late = [
            f"'[ \"$SLURMD_NODENAME\" != {name} ] || sleep {seconds}'"
            for name, seconds in zip(self.names, self.skew, strict=True)
            if seconds
        ]
        lines: dict[str, object] = {"gpus": "{syntax: none}", "ranks_per_node": ranks_per_node, "time": f"'{self.time}'"}
        lines |= {"signal_seconds": self.signal_seconds, "partition": f"'{self.partition}'"}
        lines |= {"cpus_per_rank": 1} if self.threads == "key" or (equal_threads and self.threads == "cores") else {}
        lines |= {"prelude": f"[{', '.join(late)}]"} if late else {}
        return "".join(f"{key}: {value}\n" for key, value in (lines | keys).items())


@cache
def drawn() -> Shape:
    """The shape of this test run."""
    return Shape.draw(int(os.environ.get(SEED) or random.SystemRandom().randrange(1_000_000)))
