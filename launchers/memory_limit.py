"""Counts the processes that the kernel has killed in this process's cgroup because a memory limit was reached."""

import contextlib
import re
from pathlib import Path

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Maps the controllers in a line of /proc/self/cgroup to the folders of their hierarchy below CGROUPS, and to the name of
# the file with the number of kills. The first entry is for version 2 of cgroups, the second entry for version 1.
_FILES = {"": (("", "unified"), "memory.events"), "memory": (("memory",), "memory.oom_control")}


class MemoryLimit:
    """The memory limit of this process's cgroup, in which the ranks of a launcher run as well."""

    def __init__(self) -> None:
        self._file = next((path for path in _files() if path.is_file()), None)
        self._seen = self._kills()

    def words(self) -> str:
        """Returns a message if the kernel has killed a process for lack of memory since the last call; otherwise ''."""
        before, self._seen = self._seen, self._kills()
        return f"memory limit reached: oom_kill {self._seen} in {self._file}" if self._seen > before else ""

    def _kills(self) -> int:
        found = None
        if self._file is not None:
            with contextlib.suppress(OSError):
                found = re.search(r"^oom_kill (\d+)$", self._file.read_text(), re.MULTILINE)
        return int(found[1]) if found else 0


def _files() -> list[Path]:
    """Returns the possible paths of the file with the count. A line of /proc/self/cgroup is `number:controllers:path`."""
    found = []
    with contextlib.suppress(OSError):
        for line in OWN.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            folders, name = _FILES.get(controllers, ((), ""))
            found += [CGROUPS / folder / path.strip("/") / name for folder in folders]
    return found
