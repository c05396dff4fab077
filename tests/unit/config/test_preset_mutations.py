"""A preset with a random mistake can still be planned, or is refused with a message that names the field."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_dist.config.load import load_config
from moe_dist.errors import MoeDistError
from moe_dist.plan.preflight import layout_without_data
from tests.support.cover import rest_full

ROOT = Path(__file__).parents[3]
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
SEED, MUTATIONS = 4_711, 1_000
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 7, -1, -5, 10**6, 10**30, 0.5, 1.5, -0.1, 1e-300, 1e300, float("nan"), float("inf"),
    "", "x", "auto", "../../etc", "a\nb", "\x00", "0", "true", [], {}, [1], [0, 1], [[0, 0.1]], [None], {"a": 1},
    {"kind": "top_k"}, "é" * 80, [[1, 2], [3]],
)  # fmt: skip


def leaves(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Returns the paths of all values and sections of a configuration."""
    if path:
        yield path
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))


def mutate(values: dict[str, Any], draw: random.Random) -> tuple[dict[str, Any], str, tuple[Any, ...]]:
    """Returns a copy with one mistake, a description of the mistake, and its path."""
    changed = copy.deepcopy(values)
    path = draw.choice(list(leaves(values)))
    holder: Any = changed
    for key in path[:-1]:
        holder = holder[key]
    kind = draw.choice(("value", "value", "value", "removed", "renamed"))
    last = path[-1]
    if kind == "removed" and isinstance(holder, dict):
        del holder[last]
    elif kind == "renamed" and isinstance(holder, dict):
        holder[f"{last}_"] = holder.pop(last)
    else:
        holder[last] = draw.choice(VALUES)
        kind = f"value {holder[last]!r:.40}"
    return changed, kind, path


def refusal(path: Path) -> str | None:
    """Returns the error's text, or None if the configuration can be planned."""
    try:
        layout_without_data(load_config(path))
    except MoeDistError as error:
        return str(error)
    return None


@pytest.mark.parametrize("preset", rest_full(PRESETS, 2), ids=lambda path: path.stem)
def test_a_mistake_is_accepted_or_named(preset: Path, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    values = yaml.safe_load(preset.read_text())
    path, refused = tmp_path / "mutated.yaml", 0
    for number in range(-(-MUTATIONS // len(PRESETS))):
        changed, kind, where = mutate(values, random.Random(f"{SEED}/{preset.stem}/{number}"))
        path.write_text(yaml.safe_dump(changed, sort_keys=False, allow_unicode=True))
        message = refusal(path)
        if message is not None:
            refused += 1
            named = [str(key) for key in where if isinstance(key, str)]
            assert named[-1] in message or named[0] in message, (number, kind, where, message)
    assert refused > MUTATIONS // len(PRESETS) // 4, "the mistakes should be such"
