"""Translates configurations that runs and checkpoints stored before the key `format` existed.

Such a configuration has former names of keys and kinds. It lacks keys whose present defaults differ from the behaviour at
that time. A configuration with a format number is not translated. If a later version changes names or defaults such that
stored runs would change, that version must increase the number and add a translation.
"""

from collections.abc import Mapping
from typing import Any

FORMAT = 1  # number of the present format

# Maps each former key to the present name of the key's last part. Only the last part of the dotted path is a former name; *
# stands for any item of a list.
KEYS = {
    "model.depths": "mixture_of_depths",
    "model.mixture_of_depths.set": "scope",
    "model.moe.capacity.set": "scope",
    "model.moe.router.set": "scope",
}
# Maps each key to a mapping from its former values to its present values.
VALUES = {
    "model.moe.balance.*.kind": {"load_target": "active_experts"},
    "parallel.dispatch.kind": {
        "per_rank": "all_to_all",
        "per_node": "hierarchical",
        "per_pair": "known_counts",
        "deep_ep": "deep_ep_v2",  # meant DeepEP V1, which its makers call legacy
    },
}
# Maps keys to the values that apply if a stored configuration lacks the key.
FORMER_DEFAULTS = {"loss.balance.scope": "micro_batch"}


def translate(values: Any) -> Any:
    """Returns a stored configuration (plain values, as in YAML or JSON) in the present format."""
    if not isinstance(values, Mapping) or "format" in values:
        return values
    found = _renamed(values, "")
    for key, value in FORMER_DEFAULTS.items():
        *holders, name = key.split(".")
        section = found
        for holder in holders:
            section = section.get(holder) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.setdefault(name, value)
    return found


def _renamed(value: Any, key: str) -> Any:
    if isinstance(value, list | tuple):
        return [_renamed(item, f"{key}.*") for item in value]
    if not isinstance(value, Mapping):
        return VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value
    below = f"{key}." if key else ""
    names = {name: KEYS.get(f"{below}{name}", name) for name in value}
    # If both names exist, the former name stays, and is later reported as an unknown key.
    names = {name: name if now != name and now in value else now for name, now in names.items()}
    return {now: _renamed(value[name], f"{below}{now}") for name, now in names.items()}
