"""Defines the files of a trace. Each attempt of a run has a folder trace/<attempt>/, whose files only grow:

    manifest.json    written by rank 0 before the first step: layers, columns, placement, modalities, configuration
    rank_R.tokens    one `TOKEN` for each traced token
    rank_R.ids       int16 [tokens, L, K], the chosen columns, the best first
    rank_R.weights   float16 [tokens, L, K], the routing weights; only with `Manifest.weights`
    rank_R.losses    float16 [tokens], loss (nats) of the prediction at the token, or nan; only with `Manifest.losses`
    rank_R.index     one `ENTRY` for each step, written after the step's tokens; tokens without an entry do not count

The column of a true expert is its logical id. The columns after all true experts belong to the null, identity and constant
experts of all groups. The id -2 - c is a choice of column c that a capacity dropped. The id -1 is no choice (if a group has
k < K). All numbers are little-endian.

Shape letters: L MoE layers, K largest number of choices of a token, C columns, T tokens of a step.
"""

import json
import re
import zlib
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, ConfigDict, FailFast, Field, TypeAdapter

from moe_dist.config.base.section import MAX_LAYERS, NAME_PATTERN, Count, Name, PositiveInt, Ranks
from moe_dist.config.model_schema import MAX_EXPERTS
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.placement.replica_slots import PlacementWithReplicas, Replica

FORMAT, VERSION = "moe_dist trace", 1
NO_CHOICE = -1
MANIFEST = "manifest.json"

MAX_COLUMNS = (1 << 15) - 1  # an int16 also holds -2 - c for each column c
MAX_EP = 1 << 14  # EP ranks
MAX_NAMES = 1 << 8  # groups, modalities, and modalities of a group

# Number of the sequence in the run's stream, index in this sequence, token id, and index in `Manifest.modalities`.
TOKEN = np.dtype([("sequence", "<i8"), ("position", "<i4"), ("token", "<i4"), ("modality", "<i2")])
# Step, index of its first token, number of its tokens, crc32 of its bytes in the other files, crc32 of this entry.
ENTRY = np.dtype([("step", "<i8"), ("first", "<i8"), ("rows", "<i8"), ("content", "<u4"), ("check", "<u4")])


def _checked_group(group: ExpertGroup) -> ExpertGroup:
    counts = [value for value in asdict(group).values() if isinstance(value, int)]
    if not all(re.fullmatch(NAME_PATTERN, name) for name in (group.name, *group.modalities)):
        raise ValueError(f"a group's name or modality is no name: {group.name!r:.80}, {group.modalities!r:.80}")
    if len(group.modalities) > MAX_NAMES:
        raise ValueError(f"group {group.name}: {len(group.modalities):,} modalities, and at most {MAX_NAMES} are possible")
    if not 0 <= min(counts) <= max(counts) < 1 << 31 or group.num_columns > MAX_COLUMNS:
        raise ValueError(
            f"group {group.name}: its numbers must be from 0 to 2**31, and its columns at most {MAX_COLUMNS:,}"
        )
    return group


_EPRank = Annotated[int, Field(ge=0, lt=MAX_EP)]
_Columns = Annotated[int, Field(ge=1, le=MAX_COLUMNS)]
_Layer = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
_Group = Annotated[ExpertGroup, AfterValidator(_checked_group)]


@dataclass(frozen=True)
class Manifest:
    """The facts that a reader of one attempt's files needs.

    Attributes:
        attempt: Number of the attempt in this trace, counted from 1.
        from_step: Number of steps before the attempt. Later steps that an earlier attempt traced do not count, because this
            attempt repeats them.
        ranks: Number of ranks. Each of them wrote files.
        layers: Index in the model of each MoE layer (L).
        choices: Largest number of choices of a token (K).
        groups: Expert groups, in the order of their columns.
        rank_of_expert: EP rank of each true expert.
        every, tokens: Steps from one traced step to the next, and largest number of tokens of a rank per step (None: all).
        tokenizer: Path of the tokenizers JSON file that names the tokens, or None.
        replicas: Expert and EP rank of each replica, by layer, sorted; empty if there are none.
        split: `training`, or `held-out` for the trace of a checkpoint on held-out data. Such a trace has only the
            checkpoint's step.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # applies only to `from_json`, because the constructor checks nothing

    attempt: Count
    from_step: Count
    ranks: Ranks
    layers: Annotated[tuple[_Layer, ...], FailFast(), Field(min_length=1, max_length=MAX_LAYERS)]
    choices: _Columns
    weights: bool
    groups: Annotated[tuple[_Group, ...], FailFast(), Field(min_length=1, max_length=MAX_NAMES)]
    rank_of_expert: Annotated[tuple[_EPRank, ...], FailFast()]
    modalities: Annotated[tuple[Name, ...], FailFast(), Field(max_length=MAX_NAMES)]
    every: Count = 1  # 0 means a folder of `attach` without a trace
    tokens: PositiveInt | None = None
    tokenizer: str | None = None
    configuration: dict[str, Any] = field(default_factory=dict)
    split: Literal["training", "held-out", "recorded"] = "training"
    losses: bool = False
    replicas: Annotated[tuple[Annotated[tuple[Replica, ...], FailFast()], ...], FailFast()] = ()

    @property
    def num_columns(self) -> int:
        return sum(group.num_columns for group in self.groups)

    @property
    def placement(self) -> ExpertPlacement:
        """The placement of the experts on the ranks. Raises ConfigError as `PlacementWithReplicas` does."""
        last = max([*self.rank_of_expert, *(each.rank for layer in self.replicas for each in layer)])
        found: list[list[int]] = [[] for _ in range(last + 1)]
        for expert, rank in enumerate(self.rank_of_expert):
            found[rank].append(expert)
        slots = tuple(map(tuple, found))
        if not self.replicas:
            return ExpertPlacement(self.groups, slots)
        return PlacementWithReplicas(self.groups, slots, self.replicas)

    def to_json(self) -> str:
        """Returns the text of manifest.json."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Manifest":
        """Makes a manifest from the parsed text of `to_json`. Raises ValueError if fields are invalid or contradictory."""
        values = {key: value for key, value in content.items() if key not in ("format", "version")}
        found = TypeAdapter(cls).validate_python(values)
        if len(found.replicas) not in (0, len(found.layers)):
            raise ValueError(f"replicas of {len(found.replicas)} layers, but layers={list(found.layers)!s:.80}")
        if not all(0 <= each.rank < MAX_EP for layer in found.replicas for each in layer):
            raise ValueError(f"the ranks of replicas must be from 0 to {MAX_EP - 1:,}")
        if len(found.layers) * found.num_columns > MAX_EXPERTS:
            raise ValueError(f"{len(found.layers):,} layers of {found.num_columns:,} columns are more than {MAX_EXPERTS:,}")
        return found


def content_check(*arrays: np.ndarray | None) -> int:
    """Returns one crc32 over the bytes of all arrays."""
    total = 0
    for array in arrays:
        if array is not None:
            total = zlib.crc32(np.ascontiguousarray(array).data, total)
    return total


def entry_check(entry: np.ndarray) -> int:
    """Returns the crc32 of an `ENTRY` [1] without its last field, which stores this number."""
    return zlib.crc32(entry.tobytes()[: ENTRY.itemsize - 4])
