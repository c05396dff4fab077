"""Reads the training losses of a run from its metrics.jsonl."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_dist.monitor.sinks.jsonl import read_lines


def training_between(metrics: Path, steps: Sequence[int]) -> dict[int, dict[str, float]]:
    """Maps each of the rising `steps` to means over the training steps since the previous one of `steps`. `all` is the mean
    number of nats per label, and each modality has its own mean. If experts choose tokens, `idle` is the fraction of tokens
    that no expert takes, as the mean over layers."""
    means: dict[int, dict[str, float]] = {}
    since: list[Mapping[str, Any]] = []
    wanted = set(steps)
    for record in read_lines(metrics):
        if record["kind"] != "step":
            continue
        since.append(record)
        if record["step"] in wanted:
            means[record["step"]] = _means(since)
            since = []
    return means


def _means(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    labels: dict[str, int] = {}
    nats: dict[str, float] = {}
    idle = tokens = 0
    for record in records:
        for modality, loss in record["losses"].items():
            if loss is not None:  # None if the step has no label of this modality
                count = record["labels"][modality]
                labels[modality] = labels.get(modality, 0) + count
                nats[modality] = nats.get(modality, 0.0) + loss * count
        if "idle_LG" in record["arrays"]:
            idle += _sum(record["arrays"]["idle_LG"])
            tokens += _sum(record["arrays"]["tokens_LG"])
    found = {modality: nats[modality] / count for modality, count in labels.items() if count}
    if found:
        found = {"all": sum(nats.values()) / sum(labels.values()), **found}
    return {**found, "idle": idle / tokens} if tokens else found


def _sum(count_LG: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, count_LG))
