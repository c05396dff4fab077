"""The properties of a test cluster, drawn from a seed, so that the tests meet unexpected sites.

The tests print the seed, and CLUSTER_SEED sets it. The same seed gives the same cluster.

    CLUSTER_SEED=31 make test-clusters
"""

import os
import random
from dataclasses import dataclass
from functools import cache

SEED = "CLUSTER_SEED"
# The names of eight nodes, in Slurm's order.
NAMES = (
    ("node1", "node2", "node3", "node4", "node5", "node6", "node7", "node8"),
    ("gpu-a", "gpu-b", "gpu-c", "gpu-d", "gpu-e", "gpu-f", "gpu-g", "gpu-h"),
    ("nid000009", "nid000010", "nid000011", "nid000012", "nid000013", "nid000014", "nid000015", "nid000016"),
    ("n8", "n9", "n10", "n11", "n12", "n13", "n14", "n15"),
    ("r1n2", "r1n14", "r2n3", "r2n15", "r3n4", "r3n16", "r4n5", "r4n17"),
    ("Z-front", "a100x01", "m42", "tesla", "u1", "v100x2", "w-7", "zeta"),
)
PREEMPTION = ("REQUEUE", "CANCEL")


@dataclass(frozen=True)
class Shape:
    """One possible cluster of a site.

    Attributes:
        seed: The seed of this shape.
        names: Names of the four nodes, in Slurm's order.
        more_names: Names of four more nodes, for tests with eight nodes.
        domain: DNS domain in the host name of each node. Slurm's names of the nodes omit the domain.
        partition, urgent: Names of the default partition and of the partition that preempts it.
        preemption: PreemptMode of the default partition.
        limits: Limits of the default partition: MaxTime, DefaultTime, MaxNodes and MaxCPUsPerNode.
        requeue: JobRequeue, whether Slurm requeues jobs that do not ask for it.
        cpus: CPUs that each node claims.
        threads: What sets one thread per rank: `key` (cpus_per_rank of the cluster file), `user` (OMP_NUM_THREADS
            in the environment of the submission) or `cores` (the job's cores on the node).
        signal_seconds: The key signal_seconds of the cluster file.
        time: Time limit, in one of Slurm's forms; always 30 minutes.
        silent_seconds: Slurm declares a node down after this time without an answer; a busy machine's nodes answer late.
        skew: Delay of each node's start in seconds.
        late_rank, late_seconds: The rank that one test starts long after the others, and its delay.
        late_cpus: CPUs of each rank in that test.
        network: First three bytes of the addresses of Ray's nodes.
        wire, port: First three bytes of the addresses of torchrun's nodes, and the port where its agents meet.
        agent_skew: Seconds by which torchrun's second agent starts after the first agent, or before it if negative.
        freezing_rank, freezing_step: The rank of torchrun's lost node that freezes, and the step at which it freezes.
        features: Slurm features of the eight nodes.
        gpus: The form in which a job requests GPUs.
        victims: With two ranks per node, the ranks that are killed, frozen, and ended by a native exit.
    """

    seed: int
    names: tuple[str, ...]
    more_names: tuple[str, ...]
    domain: str
    partition: str
    urgent: str
    preemption: str
    limits: str
    requeue: int
    cpus: int
    threads: str
    signal_seconds: int
    time: str
    silent_seconds: int
    skew: tuple[int, ...]
    late_rank: int
    late_seconds: int
    late_cpus: int
    network: str
    wire: str
    port: int
    agent_skew: int
    freezing_rank: int
    freezing_step: int
    features: tuple[str, ...]
    gpus: str
    victims: tuple[int, int, int]

    @classmethod
    def draw(cls, seed: int) -> "Shape":
        rng = random.Random(seed)
        partition, urgent = rng.sample(("main", "batch", "gpu-long", "debug", "A100_80", "0short"), 2)
        names, cpus = rng.choice(NAMES), rng.choice((8, 9, 12))
        limits = {
            "MaxTime": rng.choice(("30", "1:00:00", "2-0", "INFINITE")),
            "DefaultTime": rng.choice((None, "15", "0:20:00")),  # with None the default is MaxTime
            "MaxNodes": rng.choice((4, "UNLIMITED")),
            "MaxCPUsPerNode": rng.choice((cpus, "UNLIMITED")),
        }
        return cls(
            seed=seed,
            names=names[:4],
            more_names=names[4:],
            domain=rng.choice(("", ".hpc.example")),
            partition=partition,
            urgent=urgent,
            preemption=rng.choice(PREEMPTION),
            limits=" ".join(f"{name}={value}" for name, value in limits.items() if value),
            requeue=rng.choice((0, 1)),
            cpus=cpus,
            threads=rng.choice(("key", "user", "cores")),
            signal_seconds=rng.choice((60, 75, 120)),
            time=rng.choice(("30", "30:00", "0:30:00", "0-0:30")),
            silent_seconds=rng.choice((90, 120)),
            skew=tuple(rng.choice((0, 0, 2, 6)) for _ in range(4)),
            late_rank=rng.choice((0, 1)),
            late_seconds=rng.choice((65, 75, 95, 110)),  # more than the 60 s until another node sees a file
            late_cpus=rng.choice((1, 2, 3)),
            network=rng.choice(("127.0.0", "127.9.0", "127.0.31")),
            wire=rng.choice(("10.219.77", "172.30.9", "192.168.211")),
            port=rng.randrange(29_400, 29_900),
            agent_skew=rng.choice((-6, -2, 0, 2, 6)),
            freezing_rank=rng.choice((2, 3)),
            freezing_step=rng.choice((3, 4, 5)),
            features=tuple(rng.sample(("text", "vision") * 4, 8)),
            gpus=rng.choice(("gres", "gpus-per-node")),
            victims=(rng.randrange(4), rng.randrange(4), rng.randrange(4)),
        )

    def variables(self) -> dict[str, str]:
        """Returns the settings of slurm_cluster.sh, and the environment of users who submit jobs."""
        settings = {
            "NAMES": " ".join((*self.names, *self.more_names)),  # surplus names are ignored
            "DOMAIN": self.domain,
            "PARTITION": self.partition,
            "URGENT": self.urgent,
            "PREEMPT": self.preemption,
            "LIMITS": self.limits,
            "REQUEUE": str(self.requeue),
            "CPUS": str(self.cpus),
            "NODE_TIMEOUT": str(self.silent_seconds),
        }
        user = {"OMP_NUM_THREADS": "1"} if self.threads == "user" else {}
        return {f"SLURM_CI_{name}": value for name, value in settings.items()} | user

    @property
    def late(self) -> list[str]:
        """Returns the shell lines that delay each node's start by `skew`."""
        found = zip(self.names, self.skew, strict=True)
        return [f'[ "$SLURMD_NODENAME" != {name} ] || sleep {seconds}' for name, seconds in found if seconds]

    def site(self, *, ranks_per_node: int = 1, exclusive: bool = False, **keys: object) -> str:
        """Returns the text of a cluster file. `keys` replace or add lines. Each rank has one thread:
        a job has one core per rank, or it is `exclusive`, has all cores and sets the number of threads."""
        late = [f"'{line}'" for line in self.late]
        lines: dict[str, object] = {"gpus": "{syntax: none}", "ranks_per_node": ranks_per_node, "time": f"'{self.time}'"}
        lines |= {"signal_seconds": self.signal_seconds, "partition": f"'{self.partition}'"}
        lines |= {"cpus_per_rank": 1} if self.threads == "key" or (exclusive and self.threads == "cores") else {}
        lines |= {"prelude": f"[{', '.join(late)}]"} if late else {}
        return "".join(f"{key}: {value}\n" for key, value in (lines | keys).items())


@cache
def drawn() -> Shape:
    """Returns the properties of the clusters in this test run."""
    return Shape.draw(int(os.environ.get(SEED) or random.SystemRandom().randrange(1_000_000)))
