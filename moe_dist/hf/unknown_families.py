"""Tells what a model of an unknown family has that the nearest known family lacks.

`unknown_families.json` has for each type of language model in transformers the nearest known family, whose configuration
class lacks the fewest of the type's fields, and these fields. The file is generated (`tests/support/unknown_families.py`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".json")
_SHOWN = 8  # most fields that a message names


def difference(config: Mapping[str, Any]) -> str | None:
    """Returns how the model type of a config.json differs from the nearest known family; None for a type that the table
    lacks."""
    found = json.loads(TABLE.read_text()).get(config.get("model_type"))
    if found is None:
        return None
    nearest, *fields = found
    if not fields:
        return f"it has the fields of {nearest}, the nearest known family, and another function"
    named = [f"{name}={config[name]!r:.40}" if name in config else name for name in fields]
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return f"{nearest}, the nearest known family, has no {', '.join(named[:_SHOWN])}{more}"
