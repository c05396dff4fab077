"""state.json: everything of a checkpoint that is no tensor."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from pydantic import JsonValue, ValidationError

from moe_dist.checkpoint.index import StoredModel
from moe_dist.checkpoint.state import CheckpointState
from moe_dist.errors import DataError
from moe_dist.optim.adamw import step_count

STATE_FILE = "state.json"


class StateFile(StoredModel):
    """What state.json holds.

    Attributes:
        optimizer_steps: Steps that the optimizer has taken; None where it was not saved.
        placement: Groups and slots when it was written, for the reader; loading needs them not.
        versions: Of Python and torch.
        values: The caller's, see `CheckpointState.values`.
    """

    format: Literal[1] = 1
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


def state_file_of(state: CheckpointState, *, step: int, save_id: str) -> StateFile:
    """What to write for a state. Reads the optimizer's step count, which syncs with the device."""
    placement = state.layout.placement
    groups_and_slots = {"groups": [asdict(group) for group in placement.groups], "slots": placement.slots}
    return StateFile(
        save_id=save_id,
        step=step,
        world_size=state.layout.world_size,
        optimizer_steps=step_count(state.optimizer) if state.optimizer is not None else None,
        placement=json.loads(json.dumps(groups_and_slots)),
        versions={"python": platform.python_version(), "torch": str(torch.__version__)},
        values=dict(state.values),
    )


def read_state_file(folder: Path) -> StateFile:
    """The state file of a checkpoint.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return StateFile.model_validate_json((folder / STATE_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"checkpoint {folder}: cannot read {STATE_FILE}: {error}") from error
