"""Checks a whole checkpoint: files, digests, fingerprints, finite values and completeness."""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from moe_dist.checkpoint.contents import Examined, examine
from moe_dist.checkpoint.fingerprint import fingerprint, hexadecimal
from moe_dist.checkpoint.fits import misfit
from moe_dist.checkpoint.index import INDEX_FILE, STATE_FILE, CheckpointProblem, Index, StateFile, shard_file
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, TensorSpec
from moe_dist.checkpoint.storage import open_tensors
from moe_dist.errors import DataError
from moe_dist.optim.optimizer import MOMENTS
from moe_dist.placement.parameter_names import EXPERT_NAME

MOST_MISSING = 10_000  # state.json may say any number of experts
# Functions that make a CheckpointProblem of a tensor in index.json from a detail text and the tensor's name.
_incomplete = partial(CheckpointProblem, "incomplete", INDEX_FILE)
_foreign = partial(CheckpointProblem, "foreign", INDEX_FILE)


def verify(folder: Path, specs: Mapping[str, TensorSpec] | None = None) -> tuple[Examined, list[CheckpointProblem]]:
    """Returns the readable parts of a checkpoint, and all problems of the checkpoint. Reads every byte, one tensor at a
    time.

    Args:
        specs: The tensors that the checkpoint must have. If `specs` is None, only experts (by the placement in state.json)
            and moments (AdamW's, by the names of the parameters) are checked for completeness.
    """
    examined = examine(folder)
    problems = list(examined.file_problems)
    index = examined.index
    if index is None:
        return examined, problems
    problems += _missing(index, specs) if specs is not None else _missing_moments(index)
    if examined.state is not None:
        problems += _missing_experts(index, examined.state)
    sums: dict[str, int] = defaultdict(int)
    unread = {shard_file(number) for number in range(index.num_shards) if number not in examined.headers}
    for number in examined.headers:
        problems += _check_shard(folder, examined, number, sums)
    for name, entry in index.tensors.items():
        files = {shard_file(chunk.shard) for chunk in entry.chunks}
        # `_check_shard` compares each part with its shard's header. The check below compares the sum over a tensor's parts
        # with the index.
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


def _missing(index: Index, specs: Mapping[str, TensorSpec]) -> list[CheckpointProblem]:
    """Finds tensors of `specs` that the index lacks or that do not fit, and tensors of the index that `specs` lacks."""
    problems = []
    for name, spec in specs.items():
        entry = index.tensors.get(name)
        if 0 in spec.shape:
            continue
        if entry is None:
            problems.append(_incomplete("does not exist", name))
        elif misfit(entry, spec):
            detail = f"{entry.dtype} {entry.shape}, but its configuration gives {spec.dtype} {spec.shape}"
            problems.append(_foreign(detail, name))
    surplus = sorted(index.tensors.keys() - specs.keys())
    return problems + [_foreign("its configuration has no such tensor", name) for name in surplus]


def _missing_moments(index: Index) -> list[CheckpointProblem]:
    """Checks AdamW's moments: a parameter with one moment must have both, each in the parameter's shape."""
    moments = [f"{OPTIMIZER_PREFIX}{moment}." for moment in MOMENTS]
    known = {name.removeprefix(moment) for moment in moments for name in index.tensors if name.startswith(moment)}
    problems = []
    for parameter in sorted(known):
        for moment in moments:
            entry = index.tensors.get(moment + parameter)
            if entry is None:
                problems.append(_incomplete("does not exist", moment + parameter))
            elif parameter not in index.tensors:
                problems.append(_incomplete("does not exist, but its moments do", parameter))
            elif entry.shape != index.tensors[parameter].shape:
                problems.append(_foreign("its shape differs from its parameter's", moment + parameter))
    return problems


def _missing_experts(index: Index, state: StateFile) -> list[CheckpointProblem]:
    """Checks the experts: each layer with experts must have all experts of each group, with the same matrices."""
    groups = state.placement.get("groups")
    expected: dict[str, int] = {}
    for group in groups if isinstance(groups, list) else []:
        if isinstance(group, dict) and isinstance(count := group.get("num_experts"), int):
            expected[str(group.get("name"))] = count
    seen: dict[tuple[str, str], set[tuple[int, str]]] = defaultdict(set)
    for name in index.tensors:
        if match := EXPERT_NAME.fullmatch(name):
            seen[match["layer"], match["group"]].add((int(match["expert"]), match["tensor"]))
    tensors = {tensor for each in seen.values() for _, tensor in each}
    missing = (
        _incomplete("does not exist", f"{layer}.moe.experts.{group}.{expert}.{tensor}")
        for layer in sorted({layer for layer, _ in seen})
        for group, count in expected.items()
        for expert in range(count)
        for tensor in sorted(tensors)
        if (expert, tensor) not in seen[layer, group]
    )
    problems = [*islice(missing, MOST_MISSING)]
    for (layer, group), each in sorted(seen.items()):
        beyond = sorted({expert for expert, _ in each if expert >= expected.get(group, 0)})
        if beyond:
            detail = f"group {group} has {expected.get(group, 0)} experts in {STATE_FILE}"
            problems.append(_foreign(detail, f"{layer}.moe.experts.{group}.{beyond[0]}"))
    return problems
