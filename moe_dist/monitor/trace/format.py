"""The files of a trace. Every attempt of a run has a folder trace/<attempt>/ with files that only grow:

    manifest.json    written by rank 0 before the first step: layers, columns, placement, modalities, configuration
    rank_R.tokens    one `TOKEN` for each traced token
    rank_R.ids       int16 [tokens, L, K], the chosen columns, the best first
    rank_R.weights   float16 [tokens, L, K], the routing weights; only with `Manifest.weights`
    rank_R.losses    float16 [tokens], loss (nats) of the prediction at the token, or nan; only with `Manifest.losses`
    rank_R.index     one `ENTRY` for each step, written after the step's tokens; tokens without an entry do not count

The column of a true expert is its logical id; the null, identity and constant experts of all groups have the columns after
the true experts. The id -2 - c is a choice of column c that a capacity dropped; -1 is no choice (in a group with k < K).
All numbers are little-endian.

Shape letters: L MoE layers, K largest number of choices of a token, C columns, T tokens of a step.
"""

import json
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.placement.replica_slots import PlacementWithReplicas, Replica

FORMAT, VERSION = "moe_dist trace", 1
NO_CHOICE = -1
MANIFEST = "manifest.json"

# Number of the sequence in the run's stream, index in the sequence, token id, and index into `Manifest.modalities`.
TOKEN = np.dtype([("sequence", "<i8"), ("position", "<i4"), ("token", "<i4"), ("modality", "<i2")])
# Step, index of the step's first token, number of its tokens, crc32 of its bytes in the other files, crc32 of the entry.
ENTRY = np.dtype([("step", "<i8"), ("first", "<i8"), ("rows", "<i8"), ("content", "<u4"), ("check", "<u4")])


@dataclass(frozen=True)
class Manifest:
    """The facts that a reader of an attempt's files needs.

    Attributes:
        attempt: Number of the attempt in this trace, from 1.
        from_step: Last step before the attempt. Steps after `from_step` of earlier attempts do not count, because this
            attempt repeats these steps.
        ranks: Number of ranks, each of which wrote files.
        layers: Layer index of each MoE layer (L).
        choices: Largest number of choices of a token (K).
        weights: Whether weights were written.
        groups: Expert groups, in the order of their columns.
        rank_of_expert: EP rank of each true expert.
        modalities: Names of the modalities.
        every, tokens: Steps between traced steps, and largest number of a rank's tokens per step (None for all).
        tokenizer: Path of the tokenizers JSON file with the names of the tokens, or None.
        configuration: The run's configuration.
        losses: Whether losses were written.
        replicas: Expert and EP rank of the replicas in each layer, sorted; empty if there are none.
        split: `training`, or `held-out` for the trace of a trained run, whose only step is the checkpoint's step.
    """

    attempt: int
    from_step: int
    ranks: int
    layers: tuple[int, ...]
    choices: int
    weights: bool
    groups: tuple[ExpertGroup, ...]
    rank_of_expert: tuple[int, ...]
    modalities: tuple[str, ...]
    every: int = 1
    tokens: int | None = None
    tokenizer: str | None = None
    configuration: dict[str, Any] = field(default_factory=dict)
    split: str = "training"
    losses: bool = False
    replicas: tuple[tuple[Replica, ...], ...] = ()

    @property
    def num_columns(self) -> int:
        return sum(group.num_columns for group in self.groups)

    @property
    def placement(self) -> ExpertPlacement:
        """Where the experts were.

        Raises:
            ConfigError: see `PlacementWithReplicas`.
        """
        last = max([*self.rank_of_expert, *(each.rank for layer in self.replicas for each in layer)])
        slots = tuple(tuple(e for e, at in enumerate(self.rank_of_expert) if at == rank) for rank in range(last + 1))
        if not self.replicas:
            return ExpertPlacement(self.groups, slots)
        return PlacementWithReplicas(self.groups, slots, self.replicas)

    def to_json(self) -> str:
        """Returns the text of manifest.json."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Manifest":
        """Makes a manifest from the parsed text of `to_json`. Raises KeyError, TypeError or ValueError if fields are
        missing, unknown or do not fit each other."""
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        values["groups"] = tuple(ExpertGroup(**{**g, "modalities": tuple(g["modalities"])}) for g in content["groups"])
        replicas = values["replicas"] = tuple(
            tuple(Replica(*each) for each in layer) for layer in content.get("replicas", ())
        )
        if len(replicas) not in (0, len(values["layers"])):
            raise ValueError(f"replicas of {len(replicas)} layers, but layers={content['layers']}")
        del values["format"], values["version"]
        return cls(**values)


def content_check(*arrays: np.ndarray | None) -> int:
    """Returns the crc32 of the bytes of several arrays."""
    total = 0
    for array in arrays:
        if array is not None:
            total = zlib.crc32(np.ascontiguousarray(array).data, total)
    return total


def entry_check(entry: np.ndarray) -> int:
    """Returns the crc32 of an `ENTRY` [1] without its last field."""
    return zlib.crc32(entry.tobytes()[: ENTRY.itemsize - 4])
