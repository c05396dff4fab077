"""Everything that can be wrong with a checkpoint, all at once: files, digests, fingerprints, values, what is missing."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from moe_dist.checkpoint.contents import Examined, examine
from moe_dist.checkpoint.fingerprint import fingerprint, hexadecimal
from moe_dist.checkpoint.fits import DTYPES
from moe_dist.checkpoint.index import INDEX_FILE, Index, shard_file
from moe_dist.checkpoint.problems import CheckpointProblem
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, TensorSpec
from moe_dist.checkpoint.state_file import STATE_FILE, StateFile
from moe_dist.checkpoint.storage import open_tensors
from moe_dist.errors import DataError
from moe_dist.optim.adamw import MOMENTS
from moe_dist.placement.roles import EXPERT_NAME


def verify(folder: Path, specs: Mapping[str, TensorSpec] | None = None) -> tuple[Examined, list[CheckpointProblem]]:
    """What is wrong with a checkpoint; nothing if the list is empty. Reads every byte, holds one tensor
    in memory at a time.

    Args:
        specs: The tensors that should be there, where they are known. Without them it follows from the names and from the
            placement in state.json: each expert of each group in each layer, and both moments of each parameter.
    """
    examined = examine(folder)
    findings = list(examined.findings)
    index = examined.index
    if index is None:
        return examined, findings
    findings += _missing(index, specs) if specs is not None else []
    findings += _missing_moments(index)
    if examined.state is not None:
        findings += _missing_experts(index, examined.state)
    sums: dict[str, int] = defaultdict(int)
    unread = {shard_file(number) for number in range(index.num_shards) if number not in examined.headers}
    for number in examined.headers:
        findings += _check_shard(folder, examined, number, sums)
    for name, entry in index.tensors.items():
        files = {shard_file(chunk.shard) for chunk in entry.chunks}
        # What a shard's header says of its own parts was checked already; here that the whole is the sum of them.
        if not files & unread and hexadecimal(sums[name]) != entry.fingerprint and not _named(findings, name):
            findings.append(CheckpointProblem("damaged", INDEX_FILE, "its fingerprint is not that of its parts", name))
    return examined, findings


def _check_shard(folder: Path, examined: Examined, number: int, sums: dict[str, int]) -> list[CheckpointProblem]:
    header, file, findings = examined.headers[number], shard_file(number), []
    assert examined.index is not None
    try:
        with open_tensors(folder, number) as tensors:
            for name, (_, chunk) in header.parts.items():
                tensor = tensors.get_tensor(name)
                found = fingerprint(tensor, offsets=chunk.offsets, shape=examined.index.tensors[name].shape)
                sums[name] += found
                if found != header.fingerprints[name]:
                    findings.append(CheckpointProblem("damaged", file, "its bits are not those that were saved", name))
                elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    findings.append(CheckpointProblem("not finite", file, "holds nan or inf, and was saved so", name))
    except DataError as error:
        findings.append(CheckpointProblem("damaged", file, str(error)))
    return findings


def _missing(index: Index, specs: Mapping[str, TensorSpec]) -> list[CheckpointProblem]:
    """Against the tensors that the configuration in state.json calls for."""
    findings = []
    for name, spec in specs.items():
        entry = index.tensors.get(name)
        if 0 in spec.shape:
            continue
        if entry is None:
            findings.append(CheckpointProblem("incomplete", INDEX_FILE, "is not there", name))
        elif entry.shape != spec.shape or DTYPES.get(entry.dtype) != spec.dtype:
            detail = f"{entry.dtype} {entry.shape}, where its configuration says {spec.dtype} {spec.shape}"
            findings.append(CheckpointProblem("foreign", INDEX_FILE, detail, name))
    surplus = sorted(index.tensors.keys() - specs.keys())
    return findings + [
        CheckpointProblem("foreign", INDEX_FILE, "its configuration knows no such tensor", name) for name in surplus
    ]


def _missing_moments(index: Index) -> list[CheckpointProblem]:
    """Both moments of a parameter, or none of any (a checkpoint without optimizer), in the parameter's shape."""
    moments = [f"{OPTIMIZER_PREFIX}{moment}." for moment in MOMENTS]
    known = {name.removeprefix(moment) for moment in moments for name in index.tensors if name.startswith(moment)}
    findings = []
    for parameter in sorted(known):
        for moment in moments:
            entry = index.tensors.get(moment + parameter)
            if entry is None:
                findings.append(CheckpointProblem("incomplete", INDEX_FILE, "is not there", moment + parameter))
            elif parameter not in index.tensors:
                findings.append(CheckpointProblem("incomplete", INDEX_FILE, "is not there, but its moments are", parameter))
            elif entry.shape != index.tensors[parameter].shape:
                findings.append(
                    CheckpointProblem("foreign", INDEX_FILE, "has another shape than its parameter", moment + parameter)
                )
    return findings


def _missing_experts(index: Index, state: StateFile) -> list[CheckpointProblem]:
    """Each expert of each group in each layer that has experts, with the same matrices."""
    groups = state.placement.get("groups")
    expected: dict[str, int] = {}
    for group in groups if isinstance(groups, list) else []:
        if isinstance(group, dict) and isinstance(count := group.get("num_experts"), int):
            expected[str(group["name"])] = count
    seen: dict[tuple[str, str], set[tuple[int, str]]] = defaultdict(set)
    for name in index.tensors:
        if match := EXPERT_NAME.fullmatch(name):
            seen[match["layer"], match["group"]].add((int(match["expert"]), match["tensor"]))
    tensors = {tensor for each in seen.values() for _, tensor in each}
    findings = []
    for layer in sorted({layer for layer, _ in seen}):
        for group, count in expected.items():
            for expert in range(count):
                for tensor in sorted(tensors):
                    if (expert, tensor) not in seen[layer, group]:
                        name = f"{layer}.moe.experts.{group}.{expert}.{tensor}"
                        findings.append(CheckpointProblem("incomplete", INDEX_FILE, "is not there", name))
    for (layer, group), each in sorted(seen.items()):
        beyond = sorted({expert for expert, _ in each if expert >= expected.get(group, 0)})
        if beyond:
            detail = f"{STATE_FILE} says that group {group} has {expected.get(group, 0)} experts"
            findings.append(CheckpointProblem("foreign", INDEX_FILE, detail, f"{layer}.moe.experts.{group}.{beyond[0]}"))
    return findings


def _named(findings: list[CheckpointProblem], tensor: str) -> bool:
    return any(finding.tensor == tensor for finding in findings)
