"""Saves and restores the states of one rank's random number generators as JSON values. These are the generators of torch
(host and device), numpy and Python. Data order and initial weights do not use them, but depend only on the run's seed."""

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from pydantic import JsonValue

from moe_dist.errors import DataError


def generator_states(device: torch.device) -> dict[str, JsonValue]:
    """Returns the current states of the generators. The CUDA generator's state costs one device-to-host sync."""
    version, numbers, gauss = random.getstate()
    name, key, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    states: dict[str, JsonValue] = {
        "torch": _text(torch.get_rng_state()),
        "python": [version, list(numbers), gauss],
        "numpy": [name, key.tolist(), *rest],
    }
    if device.type == "cuda":
        states["cuda"] = _text(torch.cuda.get_rng_state(device))
    return states


def restore_generators(states: Mapping[str, JsonValue], device: torch.device) -> None:
    """Sets the generators to the result `states` of `generator_states`. If `states` lacks the CUDA generator's state, the
    CUDA generator is not changed. Raises DataError if a state is invalid."""
    try:
        torch.set_rng_state(_bytes(states["torch"]))
        version, numbers, gauss = states["python"]  # pyright: ignore
        random.setstate((version, tuple(numbers), gauss))  # pyright: ignore
        np.random.set_state(tuple(states["numpy"]))  # pyright: ignore
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(_bytes(states["cuda"]), device)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"the saved states of the random number generators are invalid: {error!r}") from error


def _text(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()  # JSON has no type for bytes


def _bytes(text: JsonValue) -> torch.Tensor:
    if not isinstance(text, str):
        raise TypeError(f"not hexadecimal: {text!r:.40}")
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
