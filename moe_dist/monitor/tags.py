"""Defines the tags of all scalars, their meaning, and their maximum number.

A step and its evaluation together have at most `MAX_SCALARS` scalars, whatever the number of layers, experts, groups and
modalities, because nobody reads pages with thousands of curves. Heat maps and metrics.jsonl have all other values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from moe_dist.config.base.section import RESERVED_MODALITIES

MAX_SCALARS = 40

# Prefixes of the tags of times and device readings. Scalars without these prefixes are bit-equal in two runs with one seed.
TIMING_TAGS: tuple[str, ...] = ("perf/", "device/", "comm/seconds")
TIMING_FIELDS: tuple[str, ...] = ("time", "host", "balance_note", "hints")  # some hints depend on times

GROUP_FAMILIES: tuple[str, ...] = ("experts_per_token", "null_fraction", "load_imbalance", "capacity_used")
# TensorBoard opens with the first tags of the alphabet. These four tags stand in this folder, so that they come first.
FIRST = "0_first/"
FIRST_TAGS = ("loss/total", "perf/tokens_per_second", "moe/dropped_share", "moe/capacity_used")
DEPTH_FAMILY = "computed"  # the full tag is mixture_of_depths/computed

# Tag family -> meaning, which Prometheus shows. If a family has a label, such as a group, its name ends in {label}.
MEANING: dict[str, str] = {
    "loss/{term}": "Training loss of the step: nats per label of each modality; 'balance', 'z' and 'auxiliary' (auxiliary "
    "routers, or router tuning) as added to the loss; 'total' is nats per label of all modalities plus the added terms.",
    "eval/{part}": "Held-out loss in nats per token, by modality; '<modality>_no_filler' leaves out empty image cells.",
    "optim/lr": "Learning rate.",
    "optim/grad_norm": "Global gradient norm before clipping.",
    "optim/skipped_steps": "Steps skipped so far because a loss or gradient was not finite.",
    "optim/tokens": "Input tokens so far, without padding.",
    "data/epochs/{modality}": "Passes over the modality's training data so far; 'max' is the largest of many modalities.",
    "moe/experts_per_token/{group}": "True experts per token, mean over tokens and layers.",
    "moe/null_fraction/{group}": "Share of the router's choices that went to null experts.",
    "moe/load_imbalance/{group}": "Load of the busiest true expert in x the mean expert, mean over layers; 1 is even.",
    "moe/capacity_used/{group}": "Load of the busiest expert of any layer in x an even share of all choices. A "
    "capacity counts single micro-batches, so it needs a larger factor to drop nothing.",
    "moe/rank_imbalance": "Rows x FFN width of the busiest rank over the mean rank, mean over layers; 1 is even.",
    "moe/dropped_share": "Share of the (token, expert) pairs that a capacity dropped.",
    "moe/dead_experts": "Experts that no token chose in a step, summed over layers.",
    "moe/router_entropy": "Entropy of the router's softmax in nats, mean over tokens and layers.",
    "moe/balance_efficiency_by_count": "Rows x FFN width of the mean rank over the busiest rank, in evaluation: the "
    "efficiency that the counts allow.",
    "comm/bytes_sent": "Payload bytes of dispatch and combine, forward and backward, summed over ranks and layers.",
    "comm/bytes_saved_vs_topk": "Payload bytes that top-k routing without null experts, at the same k, would add.",
    "comm/bytes_saved_vs_same_active": "Payload bytes that top-k routing with as many true experts per token would add.",
    "comm/dedup_factor": "Remote rows at one row per (token, expert), over remote rows at one row per (token, rank).",
    "comm/seconds": "Seconds inside dispatch and combine collectives, mean over ranks.",
    "perf/tokens_per_second": "Tokens per second of all ranks, without padding.",
    "perf/step_seconds": "Wall time of the step in seconds.",
    "perf/balance_efficiency": "Throughput with the real routing over throughput with the same pairs spread evenly.",
    "perf/mfu": "Model FLOPs per second over the peak FLOPs per second of all devices.",
    "device/utilisation": "GPU utilisation of rank 0 in percent; CPU utilisation of its machine if the run has no GPU.",
    "device/memory": "Most GPU memory in MiB that torch's allocator has reserved so far, of the rank with the most; most "
    "resident memory of any rank's process if the run has no GPU.",
    "device/power": "GPU power of rank 0 in watts.",
}

# More tags for models with mixture-of-depths layers. In these models fewer families are split by group.
DEPTH_MEANING: dict[str, str] = {
    "mixture_of_depths/computed/{group}": "Share of the tokens that mixture-of-depths layers compute in training.",
    "mixture_of_depths/agreement": "Share of tokens whose causal decision equals the selection of training.",
    "mixture_of_depths/gate_weight": "Gate weight of a computed token, mean over tokens and layers.",
    "mixture_of_depths/load_over_target": "Computed share of the held-out tokens over the target share; 1 is on target.",
}

# Numbers that only sinks without texts get.
HINT_MEANING: dict[str, str] = {"hints/{kind}": "Hints of this kind since the start of this attempt."}

# Picture or histogram -> meaning. A map of layers x groups that replaces scalars has the scalars' meaning.
PICTURE_MEANING: dict[str, str] = {
    "moe/load": "Choices of an expert over the mean expert's, by layer and expert, with the rank that holds the expert.",
    "moe/load_histogram": "Choices of an expert over the mean expert's, of all layers: one narrow peak at 1 is even load.",
    "moe/rank_load": "Rows x FFN width of a rank over the mean rank's, by layer and rank.",
    "rank_balance/change": "Rows x FFN width of a rank over the mean rank's, before and after a change of the placement.",
    "moe/null_fraction": "Share of choices that went to null experts, by layer and group.",
    "moe/zero_computation_fraction": "Share of choices that went to identity and constant experts, by layer and group.",
    "moe/dropped_fraction": "Share of (token, expert) pairs that a capacity dropped, by layer and group.",
    "moe/idle_fraction": "Share of tokens that no expert took, by layer and group.",
    "moe/load_over_target": "True experts per token over the target of the load controller, by layer and group.",
    "moe/relative_entropy": "The router's entropy over the entropy of equal probabilities, by layer and group.",
    "perf/rank_seconds": "Seconds that a rank works in a step, without its waits for other ranks, one value for each rank.",
    "device/rank_memory": "MiB as in device/memory, one value for each rank.",
    "moe/compute_map": "True experts that single held-out tokens take, mean over layers: picture cells and text tokens.",
    "mixture_of_depths/layers": "Share of tokens that each mixture-of-depths layer computes, agreement and gate weight.",
}

# Beginnings of those tags that only evaluations have.
EVALUATION_TAGS: tuple[str, ...] = (
    "eval/",
    "moe/balance_efficiency_by_count",
    "perf/balance_efficiency",
    "mixture_of_depths/load_over_target",
    "moe/compute_map",
)

# Single scalars: loss/{total,balance,z} 3, optim 4, moe 4, comm 5, perf 4, device 3, moe/balance_efficiency_by_count 1.
FIXED_SCALARS = 24
DEPTH_SCALARS = 3  # mixture_of_depths/{agreement,gate_weight,load_over_target}


@dataclass(frozen=True)
class TagPlan:
    """Says which tag families have one scalar per group or modality. All other families have a single scalar. `by_group`
    lists the families of `GROUP_FAMILIES` and `DEPTH_FAMILY` with one scalar per group."""

    by_group: tuple[str, ...]
    epochs_per_modality: bool
    loss_per_modality: bool


@cache  # cached, because each record calls it
def tag_plan(num_groups: int, num_modalities: int, *, mixture_of_depths: bool = False) -> TagPlan:
    """Decides which tag families are split by group or modality. As many are split as `MAX_SCALARS` allows, in this order:
    losses by modality, families by group, epochs by modality.

    Mixture-of-depths layers add scalars. With them, as many group families are split, in order, as fit into `MAX_SCALARS`.
    Without mixture-of-depths layers, either all group families are split or none.
    """
    families = (DEPTH_FAMILY, *GROUP_FAMILIES) if mixture_of_depths else GROUP_FAMILIES
    room = MAX_SCALARS - FIXED_SCALARS - (DEPTH_SCALARS if mixture_of_depths else 0)
    splits = [families[:count] for count in range(len(families), -1, -1)] if mixture_of_depths else [families, ()]
    for by_group in splits:
        for epochs in (True, False):
            used = len(by_group) * num_groups + len(families) - len(by_group)
            used += num_modalities if epochs else 1
            used += 2 * num_modalities + 1  # loss/ and eval/ of each modality, and eval/image_no_filler
            if used <= room:
                return TagPlan(by_group, epochs, True)
    return TagPlan((), False, False)


def split_tag(tag: str) -> tuple[str, str | None, str | None]:
    """Splits a tag into family, label name and value: 'moe/null_fraction/text' -> 'moe/null_fraction', 'group', 'text'."""
    head, _, rest = tag.partition("/")
    if head in ("loss", "eval"):
        return head, "term" if head == "loss" else "part", rest
    if head == "hints":
        return head, "kind", rest
    name, _, label = rest.partition("/")
    if head == "data":
        return f"{head}/{name}", "modality", label
    if (head == "moe" and name in GROUP_FAMILIES) or (head == "mixture_of_depths" and name == DEPTH_FAMILY):
        return f"{head}/{name}", "group", label
    return tag, None, None


@cache  # cached, because each record calls it for each scalar
def curve_of(tag: str) -> tuple[str, str]:
    """Returns where TensorBoard shows a scalar: the name of a sub-run ('' for the main run), and the tag in the sub-run.

    TensorBoard has one colour per run. Each group, modality and part of the evaluation therefore has its own sub-run, which
    gives each curve of a chart another colour. Example: 'moe/null_fraction/text' becomes the tag 'moe/null_fraction' of the
    sub-run 'text'. Terms of the loss, and values over all groups or modalities, are in the main run.
    """
    family, label, value = split_tag(tag)
    first = FIRST if tag in FIRST_TAGS or family in FIRST_TAGS else ""
    if not label or not value or value in (*RESERVED_MODALITIES, "mean", "max"):
        return "", first + tag
    return value, first + (f"{family}/modality" if label in ("term", "part") else family)


@cache
def meaning(tag: str) -> str:
    """Returns the text that one of the tables above has for a tag. Raises KeyError if the tag does not exist."""
    family, label, _ = split_tag(tag)
    return (MEANING | DEPTH_MEANING | HINT_MEANING)[f"{family}/{{{label}}}" if label else family]


def picture_meaning(tag: str) -> str:
    """Returns the text that `PICTURE_MEANING`, or else `MEANING`, has for the tag of a picture or histogram. Raises
    KeyError if the tag does not exist."""
    known = [tag, tag.rpartition("/")[0]]
    found = next((PICTURE_MEANING[name] for name in known if name in PICTURE_MEANING), None)
    return meaning(f"{tag}/mean") if found is None else found


def reproducible_part(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a line of metrics.jsonl without times and device readings; it is bit-equal in two runs with one seed."""
    part = {key: value for key, value in line.items() if key not in TIMING_FIELDS}
    part["scalars"] = {tag: value for tag, value in line.get("scalars", {}).items() if not tag.startswith(TIMING_TAGS)}
    return part
