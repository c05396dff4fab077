"""Former names of keys and kinds, and former defaults.

A former name in a user's file is an error, whose text gives the present name. In a configuration that a run or checkpoint
has stored, the present name replaces the former name. A stored configuration from before a key existed gets the value that
stands for the behaviour of that time.
"""

from typing import Any, NamedTuple

from moe_dist.config.keys import ITEM

# Former key (a dotted path, in which only the last part is a former name) -> the present name of that last part.
KEYS = {
    "model.depths": "mixture_of_depths",
    "model.mixture_of_depths.set": "scope",
    "model.moe.capacity.set": "scope",
    "model.moe.router.set": "scope",
    "model.moe.router.loads": "active_experts",
}
# Present key -> former value -> present value.
VALUES = {
    "model.moe.router.kind": {"fixed_load": "scheduled_top_k"},
    f"model.moe.balance.{ITEM}.kind": {"load_target": "active_experts"},
    "parallel.dispatch.kind": {
        "per_rank": "all_to_all",
        "per_node": "hierarchical",
        "per_pair": "known_counts",
        "deep_ep": "deep_ep_v2",  # V1 of DeepEP, which its makers call legacy
    },
}
# Key -> value of a stored configuration that lacks the key.
FORMER_DEFAULTS = {"loss.balance.scope": "micro_batch"}


class Rename(NamedTuple):
    """The former and present form of a renamed key, or of a renamed value as key=value."""

    old: str
    new: str

    @property
    def problem(self) -> str:
        return f"{self.old}: has been renamed; write {self.new}"


def translate(values: Any) -> Any:
    """Returns a copy of a stored configuration with present names and former defaults.

    `values` are plain values as in YAML or JSON: a whole configuration, or some of its sections, as in `{"model": ...}`.
    """
    found = translation(values)[0]
    for key, value in FORMER_DEFAULTS.items():
        *holders, name = key.split(".")
        section = found
        for holder in holders:
            section = section.get(holder) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.setdefault(name, value)
    return found


def translation(values: Any) -> tuple[Any, list[Rename]]:
    """Returns a copy of a configuration with present names, and the renames that were applied."""
    renames: list[Rename] = []
    return _translated(values, "", "", "", renames), renames


def new_key(key: str) -> str | None:
    """Returns the dotted key in present names; None if no part of the key has been renamed."""
    parts: list[str] = []
    for part in key.split("."):
        parts.append(KEYS.get(_below(_pattern(parts), part), part))
    return new if (new := ".".join(parts)) != key else None


def _translated(value: Any, old: str, new: str, pattern: str, renames: list[Rename]) -> Any:
    """Returns a copy of `value` with present names, and appends each applied rename to `renames`. `old` and `new` are the
    dotted key of `value` in former and in present names; `pattern` is `new` with ITEM for each index."""
    if isinstance(value, list | tuple):
        place = _below(pattern, ITEM)
        return [_translated(item, _below(old, i), _below(new, i), place, renames) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        today = VALUES.get(pattern, {}).get(value) if isinstance(value, str) else None
        if today is not None:
            renames.append(Rename(f"{old}={value}", f"{new}={today}"))
        return value if today is None else today
    found = {}
    for name, item in value.items():
        today = KEYS.get(_below(pattern, name), name)
        if today != name and today in value:
            today = name  # both names exist: the former name stays, and is reported as an unknown key
        if today != name:
            renames.append(Rename(_below(old, name), _below(new, today)))
        found[today] = _translated(item, _below(old, name), _below(new, today), _below(pattern, today), renames)
    return found


def _pattern(parts: list[str]) -> str:
    return ".".join(ITEM if part.isdecimal() else part for part in parts)


def _below(holder: str, part: object) -> str:
    return f"{holder}.{part}" if holder else str(part)
