"""The tags of the scalars: their meaning, and their maximum number.

Each step has at most `MAX_SCALARS`, evaluation included, for any number of layers, experts, groups and modalities: nobody
reads pages with thousands of curves. Further values become heat maps, and are all in the JSONL record.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

MAX_SCALARS = 40

# Times and device readings. All other tags are bit-equal in two runs with one seed.
TIMING_TAGS: tuple[str, ...] = ("perf/", "device/", "comm/seconds")
TIMING_FIELDS: tuple[str, ...] = ("time", "host", "balance_note")

GROUP_FAMILIES: tuple[str, ...] = ("experts_per_token", "null_fraction", "load_imbalance", "capacity_used")
RENAMED_KEYS = {"depths": "mixture_of_depths"}  # first part of a key or tag: old name -> present name
DEPTH_FAMILY = "computed"  # mixture_of_depths/computed

# family -> meaning; a family with a label ends in the label's name in braces.
MEANING: dict[str, str] = {
    "loss/{term}": "Nats a token of the step: by modality, 'balance', 'z' and 'auxiliary' (auxiliary routers while "
    "they are trained, or router tuning's regulariser) as they entered the loss, 'total' of all.",
    "eval/{part}": "Held-out nats a token by modality; '<modality>_no_filler' leaves out empty image cells.",
    "optim/lr": "Learning rate.",
    "optim/grad_norm": "Global gradient norm before clipping.",
    "optim/skipped_steps": "Steps skipped so far because a loss or gradient was not finite.",
    "optim/tokens": "Tokens seen so far, padding excluded.",
    "data/epochs/{modality}": "Epochs seen of the modality's training data; the largest where there are many modalities.",
    "moe/experts_per_token/{group}": "True experts a token took, mean over tokens and layers.",
    "moe/null_fraction/{group}": "Share of choices that went to null experts.",
    "moe/load_imbalance/{group}": "Load of the busiest true expert over the mean load, mean over layers; 1 is even.",
    "moe/capacity_used/{group}": "Load of the busiest expert of any layer over the even share of all choices: "
    "the capacity factor that would have dropped nothing.",
    "moe/rank_imbalance": "Rows x FFN width of the busiest rank over the mean rank, mean over layers; 1 is even.",
    "moe/dropped": "(token, expert) pairs dropped by a capacity.",
    "moe/dead_experts": "Experts, counted in each layer, that no token chose in this step.",
    "moe/router_entropy": "Entropy of the router's softmax in nats, mean over tokens and layers.",
    "moe/balance_efficiency_by_count": "Rows x FFN width of the mean rank over the busiest: what the counts alone allow.",
    "comm/bytes_sent": "Payload bytes sent by dispatch and combine over all ranks and layers, forward and backward.",
    "comm/bytes_saved_vs_topk": "Payload bytes that top-k over true experts alone, with the same k, sends on top.",
    "comm/bytes_saved_vs_same_active": "Payload bytes that top-k with the same mean of true experts a token sends on top.",
    "comm/dedup_factor": "Rows at one row for each remote (token, expert) over rows at one for each (token, rank).",
    "comm/seconds": "Seconds inside dispatch and combine collectives, mean over ranks.",
    "perf/tokens_per_second": "Tokens a second of all ranks, padding excluded.",
    "perf/step_seconds": "Wall time of the step in seconds.",
    "perf/balance_efficiency": "Throughput with the real routing over throughput with the same pairs spread evenly.",
    "perf/mfu": "Model FLOPs a second over the peak of all devices.",
    "device/utilisation": "Rank 0's GPU utilisation in percent; the host's CPU utilisation where there is no GPU.",
    "device/memory": "Rank 0's used GPU memory in MiB; its process' resident memory where there is no GPU.",
    "device/power": "Rank 0's GPU power in watts.",
}

# Only with model.mixture_of_depths; these tags then reduce the number of families that are split by group.
DEPTH_MEANING: dict[str, str] = {
    "mixture_of_depths/computed/{group}": "Share of the tokens that these layers compute in training.",
    "mixture_of_depths/agreement": "Share of tokens on which the causal decision of evaluation agrees with training.",
    "mixture_of_depths/gate_weight": "Weight of a computed token's block, mean over tokens and layers.",
    "mixture_of_depths/load_over_target": "Share of held-out tokens computed, over the capacity; 1 is on target.",
}

# loss/{total,balance,z} 3, optim 4, moe 4, comm 5, perf 4, device 3, moe/balance_efficiency_by_count 1.
FIXED_SCALARS = 24
DEPTH_SCALARS = 3  # mixture_of_depths/{agreement,gate_weight,load_over_target}


@dataclass(frozen=True)
class TagPlan:
    """The families of tags that are split; any other shows a single number.

    Attributes:
        by_group: Those of `GROUP_FAMILIES`, and `DEPTH_FAMILY`, that are split by group.
        epochs_per_modality, loss_per_modality: Whether these are split.
    """

    by_group: tuple[str, ...]
    epochs_per_modality: bool
    loss_per_modality: bool


@cache  # called for each record
def tag_plan(num_groups: int, num_modalities: int, *, mixture_of_depths: bool = False) -> TagPlan:
    """Splits as many families as fit into `MAX_SCALARS`: losses first, then groups, then epochs.

    Args:
        mixture_of_depths: Whether some layers compute only a share of the tokens. The scalars of these layers use part of
            `MAX_SCALARS`. So families are logged per group one after the other, in order, until the limit is reached.
            Without such layers either all families are logged per group or none.
    """
    families = (DEPTH_FAMILY, *GROUP_FAMILIES) if mixture_of_depths else GROUP_FAMILIES
    room = MAX_SCALARS - FIXED_SCALARS - (DEPTH_SCALARS if mixture_of_depths else 0)
    splits = [families[:count] for count in range(len(families), -1, -1)] if mixture_of_depths else [families, ()]
    for by_group in splits:
        for epochs in (True, False):
            used = len(by_group) * num_groups + len(families) - len(by_group)
            used += num_modalities if epochs else 1
            used += 2 * num_modalities + 1  # loss/ and eval/ for each, and eval/image_no_filler
            if used <= room:
                return TagPlan(by_group, epochs, True)
    return TagPlan((), False, False)


def split_tag(tag: str) -> tuple[str, str | None, str | None]:
    """(family, label name, label value) of a tag: 'moe/null_fraction/text' is ('moe/null_fraction', 'group', 'text')."""
    head, _, rest = tag.partition("/")
    if head in ("loss", "eval"):
        return head, "term" if head == "loss" else "part", rest
    name, _, label = rest.partition("/")
    if head == "data":
        return f"{head}/{name}", "modality", label
    if (head == "moe" and name in GROUP_FAMILIES) or (head == "mixture_of_depths" and name == DEPTH_FAMILY):
        return f"{head}/{name}", "group", label
    return tag, None, None


def meaning(tag: str) -> str:
    """The meaning of a tag in one sentence.

    Raises:
        KeyError: the tag does not exist.
    """
    family, label, _ = split_tag(tag)
    return (MEANING | DEPTH_MEANING)[f"{family}/{{{label}}}" if label else family]


def in_todays_names(line: dict[str, Any]) -> dict[str, Any]:
    """Renames the keys and tags of a line of metrics.jsonl, which an earlier version may have written, to the present
    ones."""
    line = {RENAMED_KEYS.get(key, key): value for key, value in line.items()}
    if "scalars" in line:
        line["scalars"] = {_todays_tag(tag): value for tag, value in line["scalars"].items()}
    return line


def _todays_tag(tag: str) -> str:
    head, slash, rest = tag.partition("/")
    return f"{RENAMED_KEYS.get(head, head)}{slash}{rest}"


def reproducible_part(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without times and device readings: bit-equal in two runs with one seed."""
    part = {key: value for key, value in line.items() if key not in TIMING_FIELDS}
    part["scalars"] = {tag: value for tag, value in line["scalars"].items() if not tag.startswith(TIMING_TAGS)}
    return part
