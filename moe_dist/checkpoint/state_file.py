"""state.json: everything in a checkpoint except tensors. Does not import torch."""

import json
from typing import Literal

from pydantic import JsonValue, field_validator

from moe_dist.checkpoint.index import FORMAT, StoredModel
from moe_dist.config.renamed import translate

STATE_FILE = "state.json"


class StateFile(StoredModel):
    """Content of state.json.

    Attributes:
        optimizer_steps: Steps that the optimizer has taken; None without an optimizer.
        placement: Groups and slots at the time of the save; for information, loading does not use them.
        versions: Versions of Python, torch and moe_dist.
        values: See `CheckpointState.values`; a configuration among them takes today's names.
    """

    format: Literal[2] = FORMAT
    save_id: str
    step: int
    world_size: int
    optimizer_steps: int | None
    placement: dict[str, JsonValue]
    versions: dict[str, str]
    values: dict[str, JsonValue]

    @field_validator("values")
    @classmethod
    def _in_todays_names(cls, values: dict[str, JsonValue]) -> dict[str, JsonValue]:
        return {name: translate(value) if name == "config" else value for name, value in values.items()}

    def to_json(self) -> bytes:
        """The file's content. NaN and infinity raise ValueError, because JSON does not have them."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False).encode()
