"""state.json: everything in a checkpoint except tensors. Does not import torch."""

import json
from typing import Literal

from pydantic import JsonValue

from moe_dist.checkpoint.index import FORMAT, StoredModel

STATE_FILE = "state.json"


class StateFile(StoredModel):
    """Content of state.json.

    Attributes:
        optimizer_steps: Steps that the optimizer has taken; None without an optimizer.
        placement: Groups and slots at the time of the save; for information, loading does not use them.
        versions: Versions of Python, torch and moe_dist.
        values: See `CheckpointState.values`.
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
        """The file's content. NaN and infinity raise ValueError, because JSON does not have them."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False).encode()
