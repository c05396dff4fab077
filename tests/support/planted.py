"""Faults of a cluster, planted on a node of `tests.support.slurm` for the time of a block; only its namespaces see them."""

import contextlib
import importlib.metadata
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.slurm import SlurmCluster


class Node:
    """One node of a cluster.

    Args:
        name: As Slurm has it: node1, node2, ...
    """

    def __init__(self, cluster: SlurmCluster, name: str) -> None:
        outer = (cluster.folder / "run" / f"{name}.pid").read_text().strip()
        # Its child is the first process of the node: it alone is in all of the node's namespaces.
        self.name, self._pid = name, Path(f"/proc/{outer}/task/{outer}/children").read_text().strip()
        hosts = (cluster.folder / "hosts").read_text().splitlines()
        self.address = next(line.split()[0] for line in hosts if line.split()[1] == name)

    def run(self, *command: str) -> None:
        """As root on the node."""
        inside = ["nsenter", f"--target={self._pid}", "--mount", "--net", "--pid", *command]
        done = subprocess.run(inside, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    @contextmanager
    def showing(self, path: Path, instead: Path) -> Iterator[None]:
        """The node sees one file or folder in place of another."""
        self.run("mount", "--bind", str(instead), str(path))
        try:
            yield
        finally:
            self.run("umount", str(path))

    @contextmanager
    def read_only(self, folder: Path) -> Iterator[None]:
        """The node can only read in a folder, root included."""
        with self.showing(folder, folder):
            self.run("mount", "-o", "remount,bind,ro", str(folder))
            yield

    @contextmanager
    def unknown_host(self, cluster: SlurmCluster, host: str) -> Iterator[None]:
        """A name does not resolve on the node."""
        hosts = [line for line in (cluster.folder / "hosts").read_text().splitlines() if host not in line.split()]
        without = cluster.folder / "hosts.without"
        without.write_text("\n".join(hosts) + "\n")
        with self.showing(Path("/etc/hosts"), without):
            yield

    @contextmanager
    def other_version(self, package: str, version: str, scratch: Path) -> Iterator[None]:
        """The node has another version of an installed package."""
        distribution = importlib.metadata.distribution(package)
        (metadata,) = [path for path in distribution.files or () if path.name == "METADATA"]
        installed = Path(str(distribution.locate_file(metadata)))
        other = scratch / "METADATA"
        other.write_text(
            installed.read_text().replace(f"\nVersion: {distribution.version}\n", f"\nVersion: {version}\n", 1)
        )
        with self.showing(installed, other):
            yield


@contextmanager
def slow_pair(first: Node, second: Node, *, rate: str) -> Iterator[None]:
    """What two nodes send each other is shaped to `rate`, as '50mbit'; all else is not."""
    with contextlib.ExitStack() as stack:
        for here, there in ((first, second), (second, first)):
            here.run("tc", "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb")  # unclassified: not shaped
            stack.callback(here.run, "tc", "qdisc", "del", "dev", "eth0", "root")
            here.run("tc", "class", "add", "dev", "eth0", "parent", "1:", "classid", "1:2", "htb", "rate", rate)
            match = ["u32", "match", "ip", "dst", f"{there.address}/32", "flowid", "1:2"]
            here.run("tc", "filter", "add", "dev", "eth0", "parent", "1:", "protocol", "ip", *match)
        yield
