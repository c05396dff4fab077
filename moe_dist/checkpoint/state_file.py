"""state.json: everything of a checkpoint that is no tensor. Imports no torch."""

import json
from typing import Literal

from pydantic import JsonValue

from moe_dist.checkpoint.index import FORMAT, StoredModel

STATE_FILE = "state.json"


class StateFile(StoredModel):
    """What state.json holds.

    Attributes:
        optimizer_steps: Steps that the optimizer has taken; None where it was not saved.
        placement: Groups and slots when it was written, for the reader; loading needs them not.
        versions: Of Python, torch and moe_dist.
        values: The caller's, see `CheckpointState.values`.
    """

    format: Literal[2] = FORMAT
    save_id: str
    step: int
    world_size: int
    optimizer_steps: int | None
    placement: dict[str, JsonValue]
    versions: dict[str, str]
    values: dict[str, JsonValue]

    def to_json(self) -> bytes:
        """As written. NaN and infinity are refused (ValueError): they are no JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False).encode()
