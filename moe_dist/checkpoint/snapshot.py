"""A copy of one rank's state at one step. A save writes the copy while the training continues."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from pydantic import JsonValue
from torch import Tensor

from moe_dist import __version__
from moe_dist.checkpoint.index import StateFile
from moe_dist.checkpoint.state import CheckpointState, RankLayout, TensorSpec
from moe_dist.checkpoint.storage import Piece, pieces_of
from moe_dist.optim.optimizer import step_count


@dataclass(frozen=True)
class Snapshot:
    """The data that this rank writes at `step`; `values` and `rank_values` as in `CheckpointState`."""

    step: int
    pieces: Mapping[str, Piece]  # by logical name; exactly one rank writes each piece
    specs: Mapping[str, TensorSpec]  # of all logical tensors, equal on all ranks
    layout: RankLayout
    optimizer_steps: int | None  # steps that the optimizer has taken; None without an optimizer
    values: dict[str, JsonValue]
    rank_values: dict[str, JsonValue]

    @property
    def nbytes(self) -> int:
        return sum(piece.tensor.nbytes for piece in self.pieces.values())

    def state_file(self, save_id: str) -> StateFile:
        """The content of state.json."""
        placement = self.layout.placement
        groups_and_slots = {"groups": [asdict(group) for group in placement.groups], "slots": placement.slots}
        versions = {"python": platform.python_version(), "torch": str(torch.__version__), "moe_dist": __version__}
        return StateFile(
            save_id=save_id,
            step=self.step,
            world_size=self.layout.world_size,
            optimizer_steps=self.optimizer_steps,
            placement=json.loads(json.dumps(groups_and_slots)),
            versions=versions,
            values=self.values,
        )


class HostBuffers:
    """Host memory for the copies, as many bytes as this rank writes. All saves share it, so only one snapshot can exist."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        """Copies the pieces. On CUDA one device sync, at the end."""
        copies: dict[str, Piece] = {}
        devices: set[torch.device] = set()
        for name, piece in pieces.items():
            buffer = self._buffer(name, piece.tensor)
            buffer.copy_(piece.tensor, non_blocking=True)  # pinned memory lets all copies run before one sync
            devices.add(piece.tensor.device)
            copies[name] = Piece(buffer, piece.offsets, piece.shape)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the training may overwrite the tensors after this
        return copies

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        known = self._buffers.get(name)
        if known is None or known.shape != like.shape or known.dtype != like.dtype:
            known = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
            self._buffers[name] = known
        return known


def take_snapshot(step: int, state: CheckpointState, buffers: HostBuffers | None = None) -> Snapshot:
    """A snapshot of the current state. Reading the optimizer's step count is a device-to-host sync.

    Args:
        buffers: Target of the copy; None makes no copy, for a save that blocks the training.
    """
    pieces = pieces_of(state.written())
    return Snapshot(
        step=step,
        pieces=buffers.copy(pieces) if buffers is not None else pieces,
        specs=state.specs,
        layout=state.layout,
        optimizer_steps=step_count(state.optimizer) if state.optimizer is not None else None,
        values=dict(state.values),  # copies, because the training changes its own
        rank_values=dict(state.rank_values),
    )
