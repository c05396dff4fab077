"""Reads the seeded faults. A fault is a text of the product, together with the faulty text that replaces it.

A file of faults is YAML, a list of mappings:

    - id: loss-sign                           # unique
      path: moe_dist/moe/losses.py            # of the product
      kind: swapped sign
      old: "loss = z * z"                     # stands exactly once in the file
      new: "loss = -z * z"
      at: "return z.mean()"                   # optional: line of the probe, inside a function

A fault needs `at` if no probe can stand before `old`: in a Triton kernel, or in an `elif`. It also needs `at` if `old` is
at the level of a module, where a probe would run only at import.

CI's tests were chosen with the faults in `seeded.yaml`. `held_out.yaml` was written later by another author, and is used
only to judge these tests.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from moe_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILES = {name: Path(__file__).parent / f"{name}.yaml" for name in ("seeded", "held_out")}


@dataclass(frozen=True)
class Fault:
    """A text of the product and the faulty text that replaces it."""

    id: str
    path: str
    kind: str
    old: str
    new: str
    at: str = ""

    def applied(self, source: str) -> str:
        """Returns the faulty source. Raises ConfigError unless `old` occurs exactly once in `source`."""
        return source.replace(self._once(self.old, source), self.new)

    def line(self, source: str) -> int:
        """Returns the number (from 1) of the line before which the probe is written."""
        text = self.at or self.old
        return source[: source.index(self._once(text, source))].count("\n") + 1

    def _once(self, text: str, source: str) -> str:
        if (count := source.count(text)) != 1:
            raise ConfigError(
                f"{self.id}: {text!r} stands {count} times in {self.path}; a fault needs a text that stands once"
            )
        return text


def load_faults(path: Path, root: Path = ROOT) -> list[Fault]:
    """Reads a file of faults. Raises ConfigError if an id occurs twice, or if a fault does not apply to `root`."""
    faults = [Fault(**each) for each in yaml.safe_load(path.read_text())]
    if len({fault.id for fault in faults}) < len(faults):
        raise ConfigError(f"{path}: two faults have the same id")
    for fault in faults:
        source = (root / fault.path).read_text()
        if fault.applied(source) == source:
            raise ConfigError(f"{fault.id}: old and new are equal")
        fault.line(source)
    return faults
