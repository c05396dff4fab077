"""The table of all launchers. This module imports no launcher.

The commands `moe-dist launch NAME`, `moe-dist doctor --on NAME`, `moe-dist explain launch.NAME` and `moe-dist status` read
the table. An installed package adds a launcher by an entry point of the group `moe_dist.launchers`:

    [project.entry-points."moe_dist.launchers"]
    NAME = "package.module:Class"
"""

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from moe_dist.errors import ConfigError

if TYPE_CHECKING:
    from launchers.launcher import Launcher

GROUP = "moe_dist.launchers"  # group of the entry points
# Maps the name of a launcher to its class, and to its line in the help of `moe-dist launch`.
LAUNCHERS: Mapping[str, tuple[str, str]] = {
    "local": ("launchers.local:LocalLauncher", "Run on this machine, with one process per rank."),
    "slurm": ("launchers.slurm.__main__:SlurmLauncher", "Submit a run to a Slurm cluster."),
    "ray": ("launchers.ray.__main__:RayLauncher", "Run on a Ray cluster, or submit a run to a Ray cluster."),
    "kubernetes": ("launchers.kubernetes.__main__:KubernetesLauncher", "Print the Kubernetes manifests of a run."),
}


def launcher_table() -> dict[str, tuple[str, str]]:
    """Returns the class and the help line of each launcher by name, including the launchers of installed packages. Imports
    no launcher."""
    outside = {
        each.name: (each.value, f"Run by {each.dist.name if each.dist is not None else 'another package'}.")
        for each in entry_points(group=GROUP)
    }
    return outside | dict(LAUNCHERS)


def load_launcher(name: str) -> "Launcher":
    """Imports a launcher. Raises ConfigError if no launcher has this name, or if its package cannot be imported."""
    table = launcher_table()
    if name not in table:
        raise ConfigError(f"launcher {name!r}: must be one of {', '.join(table)}; or install the package that brings it")
    module, _, attribute = table[name][0].partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in LAUNCHERS:
            raise
        raise ConfigError(f"launcher {name!r}: its package has no {table[name][0]} ({error}); install it again") from error
    return found()
