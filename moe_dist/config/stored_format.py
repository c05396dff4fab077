"""Translates configurations that runs and checkpoints stored before the key `format` existed.

Such a configuration has former names of keys and kinds. It lacks keys whose present defaults differ from the behaviour at
that time. In a configuration with a format number only removed keys are left out. A version whose changes of names or
defaults would change stored runs must increase the number and add a translation.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

FORMAT = 1  # number of the present format

# Maps each former key to the present name of the key's last part. In a dotted path only the last part is a former name, and
# * stands for any item of a list.
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
# Maps removed keys to the values that do not change a run. A stored key with such a value is left out, also if the
# configuration has a format number. A key with any other value stays, and is rejected as unknown.
REMOVED = {
    "loss.distillation.top_logits": (None,),
    "optimizer.moments": ("fp32",),
    "parallel.check_exchanges": (False, True),
}
REMOVED_INIT_RULE = "split_experts"  # left out, because rules of `run.init_rules` have acted before anything is stored


def translate(values: Any) -> Any:
    """Returns a stored configuration (plain values, as in YAML or JSON) in the present format."""
    if not isinstance(values, Mapping):
        return values
    found = deepcopy(values) if "format" in values else _renamed(values, "")
    for key, value in FORMER_DEFAULTS.items() if "format" not in values else ():
        section, name = _holder(found, key)
        section.setdefault(name, value)
    for key, harmless in REMOVED.items():
        section, name = _holder(found, key)
        if name in section and section[name] in harmless:
            del section[name]
    section, name = _holder(found, "run.init_rules")
    if isinstance(section.get(name), list):
        section[name] = [rule for rule in section[name] if rule != REMOVED_INIT_RULE]
    return found


def _holder(values: Any, key: str) -> tuple[dict[str, Any], str]:
    """Returns the section with the dotted key ({} if it is missing), and the last part of the key."""
    *holders, name = key.split(".")
    for holder in holders:
        values = values.get(holder) if isinstance(values, dict) else None
    return (values if isinstance(values, dict) else {}), name


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
