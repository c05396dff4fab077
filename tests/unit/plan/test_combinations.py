"""For random combinations of kinds, either preflight gives a reason to refuse them, or a model of tiny size can be
built and take a step.

A run of one rank takes a real step and, if its evaluation is causal, also a forward pass of evaluation. With several ranks,
each rank's model is built on the meta device, as in a dry run.
"""

import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.config.keys import find
from moe_dist.config.schema import Config
from moe_dist.config.yaml_text import dump_yaml
from moe_dist.errors import ConfigError
from moe_dist.parallel.mesh import Mesh, make_mesh
from moe_dist.plan.preflight import Preflight, check_file
from moe_dist.train.build.training import build_loader, build_model, build_training, loop_settings, state_specs
from tests.support.cover import exhaustive, full
from tests.support.one_rank import world_of_one
from tests.support.tiny import IMAGE_IDS

ADAPTIVE = ("top_p", "relu", "threshold", "predicted_k")
NAMES = [
    "text", "noise", "layer", "scores", "gates", "causal", "experts", "train", "forward", "auxiliary", "threshold",
    "seed",
]  # fmt: skip
FIXES = (
    r"\b(set|take|lower|raise|give|leave|shorten|name|add|call|start|change"
    r"|train|tune|make|build|route|generate|remove|instead)\b"
)
SEQ_LEN, DIM, LAYERS = 16, 16, 2


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    with world_of_one():
        yield


def drawn(rng: random.Random, data: Path, root: Path) -> dict[str, Any]:
    """Returns one random configuration as plain values. About one value in five differs from the usual value."""

    def rare(*values: Callable[[], Any] | Any, p: float = 0.2) -> Any:
        """Returns the first value, or with probability `p` another one."""
        value = rng.choice(values[1:]) if rng.random() < p else values[0]
        return value() if callable(value) else value

    lora = rng.random() < 0.15
    kinds = (_top_k, _expert_choice, _group_limited, _adaptive, _gating_residual)
    router = (_top_k if lora and rng.random() < 0.9 else rng.choice(kinds))(rng)
    names = rng.sample(NAMES, rng.choice((1, 2)))
    plain = router["kind"] == "expert_choice"
    groups = {}
    for index, name in enumerate(names):
        others = {} if rng.random() < (0.92 if plain else 0.4) else {
            "num_null": rng.choice((1, 4)),
            "num_identity": 0 if lora else rare(0, 1),
            "num_constant": 0 if lora else rare(0, 1),
        }  # fmt: skip
        modalities = ["text", "image"] if len(names) == 1 else [("text", "image")[index]]
        groups[name] = {"num_experts": rare(4, 2, 3, p=0.1), "top_k": rng.choice((1, 2)), "ffn_dim": 8, **others}
        groups[name]["modalities"] = modalities
    ep = rng.choice((1, 1, 1, 2, 4))
    only: dict[str, Any] = {}
    init: dict[str, Any] = {}
    if lora or rng.random() < 0.05:
        only, init = {"only": "adapters"}, {"init_from": "runs/base", "init_rules": ["adapt"]}
    elif router.get("causal") == "auxiliary" or rng.random() < 0.03:
        only, init = {"only": "auxiliary_routers"}, {"init_from": "runs/first"}
    target = {"kind": "active_experts", "target": {names[0]: rng.choice((0.5, 1.0))}, "rate": 0.1}
    biased = router.get("selection_bias", router["kind"] in ("group_limited", *ADAPTIVE))
    balance = rare([], [{"kind": "loss_free"}], [target], [target, {"kind": "loss_free"}], p=0.4 if biased else 0.02)
    experts_choose = router["kind"] == "expert_choice"
    moe = {
        "groups": groups,
        "router": router,
        "experts": {"kind": "lora", "rank": 2, "alpha": 4.0, "dropout": rare(0.0, 0.1)} if lora else {"kind": "ffn"},
        "balance": balance,
        "capacity": rare(
            None, {"factor": 1.0}, {"factor": 0.5, "drop": "position"}, p=0.02 if lora or experts_choose else 0.2
        ),
        "shared_ffn_dim": rare(0, 4, p=0.02 if lora else 0.2),
    }
    if lora and router["kind"] == "top_k":
        router.update(normalise="none", scale=1.0)
    depths = {
        "capacity": 0.5,
        "causal": rng.choice(("threshold", "auxiliary")),
        "scope": rng.choice(("rank", "ep_group", "world")),
    }
    dispatch = rare(
        {"kind": "all_to_all"},
        {"kind": "all_to_all", "overlap": True, "chunks": 2},
        {"kind": "hierarchical", "ranks_per_node": rng.choice((1, 2))},
        {"kind": "known_counts"},
        {"kind": "static", "room": 100.0},
        {"kind": "deep_ep_v2"},
        {"kind": "hybrid_ep"},
        p=0.02 if lora else 0.25,
    )  # fmt: skip
    slots = [f"{name}/{index}" for name in names for index in range(groups[name]["num_experts"])]
    explicit = {"policy": "explicit", "slots": [slots[rank::ep] for rank in range(ep)]}
    return {
        "run": {"name": "drawn", "root": str(root), **init},
        "model": {
            "hidden_dim": DIM, "num_layers": LAYERS, "num_heads": 2, "num_kv_heads": 1, "vocab_size": IMAGE_IDS[1],
            "max_seq_len": SEQ_LEN, "dense_ffn_dim": 8,
            "attention_lora": rare(None, {"rank": 2, "alpha": 4.0}, p=0.3 if lora else 0.03),
            "mixture_of_depths": None if rng.random() < 0.85 else depths, "moe": {**moe, "first": rare(0, 1, p=0.1)},
        },
        "data": {"path": str(data), "seq_len": SEQ_LEN, "pack_window": 8},
        "train": {"steps": 2, "global_batch": 4 * ep, "micro_batch": 2, **only},
        "optimizer": {
            "lr": 1e-3,
            "schedule": rare({"kind": "constant"}, {"kind": "cosine"}, {"kind": "wsd", "decay_steps": 1}),
        },
        "loss": {
            "balance": {
                "kind": rare("null_averaged", "vanilla", "null_split", "weighted"),
                "schedule": [[0, 0.0 if experts_choose and rng.random() < 0.95 else 0.01]],
            },
            "z": 0.0 if experts_choose else rare(0.0, 1e-3),
        },
        "parallel": {
            "ep": ep,
            "data": rng.choice(("ddp", "fsdp2")),
            "recompute": rng.choice(("none", "experts", "block")),
            "precision": rng.choice(("fp32", "bf16")),
            "device": "cpu",
            "dispatch": dispatch,
            "expert_gemm": rare("auto", "loop", "grouped"),
            "expert_pair_budget": rare(None, 8, p=0.02 if lora else 0.2),
        },
        "placement": rare({"policy": "interleaved"}, {"policy": "pinned"}, explicit, p=0.02 if lora else 0.3),
        "evaluation": {"every": 2, "sequences": 2, "final_sequences": 2},
    }  # fmt: skip


def _top_k(rng: random.Random) -> dict[str, Any]:
    return {
        "kind": "top_k", "normalise": rng.choice(("true_chosen", "all_chosen", "true_all", "none")),
        "scale": rng.choice((1.0, 2.0)), "null_logit": rng.choice(("each", "single")),
        "selection_bias": rng.random() < 0.5,
    }  # fmt: skip


def _expert_choice(rng: random.Random) -> dict[str, Any]:
    return {
        "kind": "expert_choice", "scope": rng.choice(("rank", "ep_group", "world")),
        "noise": rng.choice((0.0, 0.0, 1.0)),
        "causal": rng.choice(("threshold", "threshold", "threshold", "auxiliary", None)),
        "capacity": rng.choice((None, 0.5)),
    }  # fmt: skip


def _adaptive(rng: random.Random) -> dict[str, Any]:
    return {"kind": rng.choice(ADAPTIVE)}


def _gating_residual(rng: random.Random) -> dict[str, Any]:
    return {"kind": "gating_residual", "selection_bias": rng.random() < 0.5}


def _group_limited(rng: random.Random) -> dict[str, Any]:
    n_group, topk_group = rng.choice(((1, 1), (2, 1), (2, 2), (2, 2), (4, 2), (2, 1), (3, 1), (1, 2)))
    normalise = rng.choice(("true_chosen", "none"))
    return {"kind": "group_limited", "n_group": n_group, "topk_group": topk_group, "normalise": normalise}


def refused(values: dict[str, Any], path: Path) -> tuple[Preflight | None, tuple[str, ...]]:
    path.write_text(dump_yaml(values))
    try:
        return check_file(path), ()
    except ConfigError as error:
        return None, error.problems


def check_words(problems: tuple[str, ...]) -> None:
    """Checks that each problem begins with a key of the schema, and has a rule and a fix."""
    for problem in problems:
        key = re.match(r"[a-z_.0-9A-Z-]+", problem)
        assert key is not None, problem
        assert find(Config, key[0].rstrip(".")), problem
        assert ":" in problem or " must " in problem or " names " in problem or " has " in problem, problem
        assert re.search(FIXES, problem), problem


@cache  # each mesh makes process groups, whose threads would accumulate over 2,000 draws
def mesh_of(ranks_per_node: int | None) -> Mesh:
    return make_mesh(ep=1, device=torch.device("cpu"), timeout=600.0, ranks_per_node=ranks_per_node)


def take_a_step(plan: Preflight) -> None:
    config = plan.config
    mesh = mesh_of(config.parallel.dispatch.node_size)
    training = build_training(config, plan.manifest, plan.placement, mesh)
    loader = build_loader(config, plan.manifest, rank=0, world_size=1)
    batches = loader.batches(0)
    settings = loop_settings(config, plan.manifest, plan.placement)
    result = training.step(batches, lr=settings.lr(0), aux=settings.aux(0), number=0)
    assert result.grad_norm == result.grad_norm, "the gradient is not a number"


def build_each_rank(plan: Preflight) -> None:
    for rank in range(plan.placement.num_ranks):
        with torch.device("meta"):
            build_model(plan.config, plan.placement, ep_rank=rank, ep_group=None)
    assert state_specs(plan.config)


def run(numbers: range, seed: int, data: Path, root: Path) -> None:
    """Draws configurations in order, and builds those whose position is in `numbers`."""
    rng, built, count = random.Random(seed), 0, len(numbers)
    for number in range(numbers.stop):
        values = drawn(rng, data, root)
        if number not in numbers:
            continue
        try:
            plan, problems = refused(values, root / "drawn.yaml")
            check_words(problems)
            if plan is not None:
                built += 1
                (take_a_step if plan.config.parallel.ep == 1 else build_each_rank)(plan)
        except Exception as error:
            raise AssertionError(f"combination {number} of seed {seed}:\n{dump_yaml(values)}") from error
    assert count // 5 <= built <= count - count // 5, f"{built} of {count} built: both outcomes must be seen"


@pytest.mark.parametrize(
    ("seed", "numbers"),
    # The second case has groups with the names "experts" and "gates".
    [(0, range(30)), (1, range(368, 369)), full(0, range(30, 200)), exhaustive(1, range(2000))],
    ids=str,
)
@pytest.mark.slow
def test_combinations_are_refused_in_words_or_take_a_step(
    tiny_data: Path, tmp_path: Path, seed: int, numbers: range
) -> None:
    run(numbers, seed, tiny_data, tmp_path)
