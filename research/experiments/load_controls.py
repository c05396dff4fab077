"""Adds a control to each method of a comparison. The control has the same loads, but does not choose for each token.

In each layer, a token of the control gets the mean number of experts that the method's tokens of the same modality take. If
this mean is not a whole number, a random draw rounds it. If a method is no better than its control, the method gains by
moving experts between modalities and layers, and not by choosing for each token.
"""

from collections.abc import Mapping
from typing import Any

from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest

SUFFIX = "_loads"
FIXED = ("fixed", "top_k")  # methods in which all tokens have the same mean number of experts
MODALITIES = {"text", "image"}


def check_modalities(manifest: Manifest) -> None:
    """Raises ConfigError if the data do not have exactly the two modalities for which controls are defined."""
    if set(manifest.modalities) != MODALITIES:
        there = ", ".join(manifest.modalities)
        raise ConfigError(f"--controls: loads are taken by text and image, and the data have {there}; leave it out")


def with_controls(
    arms: Mapping[str, dict[str, Any]], router: Mapping[str, Any], top_k: Mapping[str, int]
) -> dict[str, Any]:
    """Returns a study's arms. After each method comes its control.

    Args:
        router: Settings of the routing weights of the controls.
        top_k: Largest number of experts of a token, by the configuration key of each group.
    """
    found: dict[str, Any] = {}
    for name, arm in arms.items():
        found[name] = arm
        if name not in FIXED:
            found[name] = {**arm, "asks": ["load_tables"]}
            found[f"{name}{SUFFIX}"] = {
                "about": f"the loads of {name} for text and image in each layer, by a random draw",
                "seeds": "decisive",
                "set": {**top_k, "model.moe.router": {**router, "kind": "top_k_by_id"}, **_rate(arm)},
                "measured": {"model.moe.router.table": {"arm": name, "metric": "load_tables.by_modality_folder"}},
            }
    return found


def _rate(arm: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in arm["set"].items() if key == "optimizer.lr"}
