"""Checks that all files of a checkpoint are intact, digests and fingerprints match, and tensors are finite and complete."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from moe_dist.checkpoint.contents import Examined, examine
from moe_dist.checkpoint.fingerprint import fingerprint, hexadecimal
from moe_dist.checkpoint.fits import ABSENT, differences
from moe_dist.checkpoint.index import INDEX_FILE, CheckpointProblem, shard_file
from moe_dist.checkpoint.state import TensorSpec
from moe_dist.checkpoint.storage import open_tensors
from moe_dist.errors import DataError


def verify(folder: Path, specs: Mapping[str, TensorSpec] | None = None) -> tuple[Examined, list[CheckpointProblem]]:
    """Returns the readable parts of a checkpoint and all its problems. Reads every byte, one tensor at a time. `specs` are
    the tensors that the checkpoint must have; with None, the tensors in its index are checked."""
    examined = examine(folder)
    problems = list(examined.file_problems)
    index = examined.index
    if index is None:
        return examined, problems
    problems += [
        CheckpointProblem("incomplete" if difference == ABSENT else "foreign", INDEX_FILE, difference, name)
        for name, difference in (differences(index, specs) if specs is not None else {}).items()
    ]
    sums: dict[str, int] = defaultdict(int)
    unread = {shard_file(number) for number in range(index.num_shards) if number not in examined.headers}
    for number in examined.headers:
        problems += _check_shard(folder, examined, number, sums)
    for name, entry in index.tensors.items():
        files = {shard_file(chunk.shard) for chunk in entry.chunks}
        # `_check_shard` compares each part's fingerprint with the shard's header. Here the sum of the parts' fingerprints
        # is compared with the index.
        if files & unread or any(problem.tensor == name for problem in problems):
            continue
        if hexadecimal(sums[name]) != entry.fingerprint:
            problems.append(CheckpointProblem("damaged", INDEX_FILE, "its fingerprint is not the sum over its parts", name))
    return examined, problems


def _check_shard(folder: Path, examined: Examined, number: int, sums: dict[str, int]) -> list[CheckpointProblem]:
    header, file, problems = examined.headers[number], shard_file(number), []
    assert examined.index is not None
    try:
        with open_tensors(folder, number) as tensors:
            for name, (_, chunk) in header.parts.items():
                tensor = tensors.get_tensor(name)
                found = fingerprint(tensor, offsets=chunk.offsets, shape=examined.index.tensors[name].shape)
                sums[name] += found
                if found != header.fingerprints[name]:
                    problems.append(CheckpointProblem("damaged", file, "its bits differ from those that were saved", name))
                # Only intact tensors are checked for nan and inf, because damaged bits may be read as nan.
                elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    detail = "contains nan or inf, and was saved like that"
                    problems.append(CheckpointProblem("not finite", file, detail, name))
    except DataError as error:
        problems.append(CheckpointProblem("damaged", file, str(error)))
    return problems
