"""Checkpoints and initial values of earlier versions depend on the roles and logical names of parameters, which must not
change."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint.state import RankLayout, capture
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.initialise import initialise
from moe_dist.placement.parameter_names import Role, named_parameters, role_of_name
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.policies import expert_groups
from moe_dist.train.build.training import build_model
from tests.support.tiny import tiny_config

# Commit e0d2e61 wrote this file with seed 3. For each case and tensor it has the shape and a hash of the initial bytes.
WRITTEN_BEFORE = json.loads((Path(__file__).parents[2] / "data/names_of_e0d2e61.json").read_text())
SMALL = {"model.hidden_dim": 8, "model.num_heads": 2, "model.num_kv_heads": 1, "model.vocab_size": 16}
PAIR = {name: {"num_experts": 2, "top_k": 1, "ffn_dim": width} for name, width in (("text", 4), ("image", 6))}
CASES: dict[str, dict[str, Any]] = {
    "top_k": {
        "model.moe.groups": {
            "text": {"num_experts": 3, "top_k": 2, "ffn_dim": 4, "num_null": 1, "num_identity": 1},
            "image": {"num_experts": 2, "top_k": 2, "ffn_dim": 6, "num_null": 2, "num_constant": 1},
        },
        "model.moe.router": {"kind": "top_k", "selection_bias": True, "null_logit": "single"},
        "model.moe.shared_ffn_dim": 4, "model.moe.shared_gate": True, "model.qk_norm": "head",
        "model.attention_bias": "qkv", "model.tie_embeddings": True,
    },
    "expert_choice": {
        "model.moe.groups": PAIR, "model.moe.router": {"kind": "expert_choice", "causal": "auxiliary"},
        "model.moe.every": 2, "model.dense_ffn_dim": 4,
        "model.mixture_of_depths": {"every": 2, "capacity": 0.5, "causal": "auxiliary"},
        "train.only": "auxiliary_routers", "run.init_from": "elsewhere",
    },
    "thresholds": {
        "model.moe.groups": PAIR,
        "model.moe.router": {"kind": "expert_choice", "causal": "threshold"},
        "model.mixture_of_depths": {"every": 2, "capacity": 0.5, "causal": "threshold"},
    },
    "lora": {
        "model.moe.groups": {
            "text": {"num_experts": 2, "top_k": 1, "ffn_dim": 4, "num_null": 1, "modalities": ["text", "image"]}
        },
        "model.moe.experts": {"kind": "lora", "rank": 2, "alpha": 4.0},
        "model.attention_lora": {"rank": 2, "alpha": 4.0}, "train.only": "adapters", "run.init_from": "elsewhere",
        "run.init_rules": ["adapt"],
    },
}  # fmt: skip
LATER: dict[str, dict[str, Any]] = {  # kinds that commit e0d2e61 lacks
    "ffn_lora": {**CASES["lora"], "model.moe.experts": {"kind": "ffn_lora", "rank": 2, "alpha": 4.0}},
}


def made(case: str, device: str = "cpu") -> tuple[Transformer, ExpertPlacement]:
    config = tiny_config(Path("data"), Path("runs"), {**SMALL, **(CASES | LATER)[case]})
    groups = expert_groups(config.model.moe)
    placement = ExpertPlacement(groups, (tuple(expert for group in groups for expert in group.experts),))
    with torch.device(device):
        return build_model(config, placement, ep_rank=0, ep_group=None), placement


@pytest.mark.parametrize("case", CASES)
def test_names_and_initial_values_stay_as_they_were(case: str) -> None:
    model, placement = made(case, "meta")
    initialise(model, placement, ep_rank=0, device=torch.device("cpu"), seed=3, std=0.02)
    tensors = capture(model, None, RankLayout(placement)).tensors()
    found = {
        name: f"{'x'.join(map(str, t.shape))} {hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]}"
        for name, t in tensors.items()
    }
    assert found == WRITTEN_BEFORE[case]


@pytest.mark.parametrize("case", CASES | LATER)
def test_a_stored_name_tells_the_role(case: str) -> None:
    model, _ = made(case, "meta")
    for _, name, role, _ in named_parameters(model):
        stored = name.replace(".experts.text.", ".experts.text.0.").replace(".experts.image.", ".experts.image.0.")
        assert role_of_name(stored) is role, name


def test_every_role_is_taken() -> None:
    assert {each.role for case in CASES | LATER for each in named_parameters(made(case, "meta")[0])} == set(Role)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("layers.0.moe.experts.router.0.gate", Role.EXPERT),
        ("layers.0.moe.router.experts.auxiliary.inner", Role.AUXILIARY_ROUTER),
        ("layers.0.moe.router.auxiliary.true", Role.ROUTER),
        ("layers.0.moe.router.adapters.threshold", Role.ROUTER),
        ("layers.0.moe.adapters.router.gate_a", Role.ADAPTER),
        ("layers.0.moe.free.experts.vector", Role.ZERO_COMPUTATION),
        ("family.model.layers.0.mlp.experts.3.gate_up_proj", Role.EXPERT),
        ("family.model.layers.0.mlp.experts.3.gate_up_proj_lora_A", Role.EXPERT_ADAPTER),
        ("family.model.layers.0.mlp.shared_experts.gate_proj.lora_B", Role.ADAPTER),
        ("family.model.layers.0.mlp.shared_expert_gate.weight", Role.DENSE),
        ("family.model.layers.0.mlp.router.bias", Role.ROUTER),
    ],
)
def test_a_group_may_be_called_like_a_role(name: str, role: Role) -> None:
    assert role_of_name(name) is role
