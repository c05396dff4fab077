"""Plants faults on one node of a `tests.support.slurm` cluster during a block. Only the node's namespaces see them."""

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
        name: Slurm's name: node1, node2, ...
    """

    def __init__(self, cluster: SlurmCluster, name: str) -> None:
        outer = (cluster.folder / "run" / f"{name}.pid").read_text().strip()
        # The process `outer` is not in all of the node's namespaces. Its only child, the node's first process, is.
        self.name, self._pid = name, Path(f"/proc/{outer}/task/{outer}/children").read_text().strip()
        hosts = (cluster.folder / "hosts").read_text().splitlines()
        self.address = next(line.split()[0] for line in hosts if line.split()[1] == name)

    def run(self, *command: str) -> None:
        """Runs a command as root on the node."""
        inside = ["nsenter", f"--target={self._pid}", "--mount", "--net", "--pid", *command]
        done = subprocess.run(inside, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    @contextmanager
    def showing(self, path: Path, instead: Path) -> Iterator[None]:
        """Replaces one file or folder by another on the node."""
        self.run("mount", "--bind", str(instead), str(path))
        try:
            yield
        finally:
            self.run("umount", str(path))

    @contextmanager
    def read_only(self, folder: Path) -> Iterator[None]:
        """Makes a folder read-only on the node, even for root."""
        with self.showing(folder, folder):
            self.run("mount", "-o", "remount,bind,ro", str(folder))
            yield

    @contextmanager
    def other_version(self, package: str, version: str, scratch: Path) -> Iterator[None]:
        """Gives the node another version of an installed package."""
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
    """Limits the traffic between two nodes to `rate`, such as '50mbit'. All other traffic is unlimited."""
    with contextlib.ExitStack() as stack:
        for here, there in ((first, second), (second, first)):
            # traffic without a class is not limited
            here.run("tc", "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb")
            stack.callback(here.run, "tc", "qdisc", "del", "dev", "eth0", "root")
            here.run("tc", "class", "add", "dev", "eth0", "parent", "1:", "classid", "1:2", "htb", "rate", rate)
            match = ["u32", "match", "ip", "dst", f"{there.address}/32", "flowid", "1:2"]
            here.run("tc", "filter", "add", "dev", "eth0", "parent", "1:", "protocol", "ip", *match)
        yield
