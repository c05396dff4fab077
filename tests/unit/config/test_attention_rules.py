"""Rules of the section `model` for sliding windows, rotary scalings and kinds of attention."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moe_dist.config.schema import Config
from tests.support.messages import refused
from tests.support.tiny import tiny_config

LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 8}


def made(**model: Any) -> Config:
    return tiny_config(Path("none"), Path("runs"), {f"model.{name}": value for name, value in model.items()})


def test_windows_by_layer() -> None:
    layers = made().model.num_layers
    assert made().model.windows == (None,) * layers
    assert made(sliding_window=4).model.windows == (4,) * layers
    assert made(sliding_window=4, sliding_layers=[1]).model.windows == (None, 4, *(None,) * (layers - 2))


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ({"sliding_layers": [0]}, ("sliding_layers=[0] needs sliding_window",)),
        ({"sliding_window": 4, "sliding_layers": [0, 99]}, ("sliding_layers=[99]", "num_layers")),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 4.0}}, ("high_freq_factor=4.0",)),
        ({"rope_scaling": {"kind": "linear"}}, ("factor",)),
        ({"rope_scaling": {"kind": "longrope", "factor": 2.0}}, ("longrope", "linear")),
        ({"sliding_window": 4, "sliding_layers": []}, ("sliding_layers=[] names no layer", "sliding_window=null")),
        (
            {"rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}, "head_dim": 2},
            ("head_dim=2 must be at least 4", "rope_scaling.kind=dynamic"),
        ),
        ({"head_dim": 8, "rope_dim": 3}, ("rope_dim=3 must be even and at most head_dim=8",)),
        ({"head_dim": 8, "rope_dim": 10}, ("rope_dim=10 must be even and at most head_dim=8",)),
        (
            {
                "rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8},
                "head_dim": 8,
                "rope_dim": 2,
            },
            ("rope_dim=2 must be at least 4", "rope_scaling.kind=dynamic"),
        ),
        (
            {
                "attention": {"kind": "latent", "kv_rank": 8, "value_dim": 8},
                "qk_norm": "head",
                "attention_bias": "qkv",
                "attention_lora": {"rank": 2, "alpha": 2.0},
            },
            (
                "num_kv_heads=2: attention.kind=latent has keys and values for each of num_heads=4; set it to 4",
                "rope_dim=null: attention.kind=latent rotates a part",
                "qk_norm=head",
                "attention_bias=qkv",
                "attention_lora.targets has k, v: attention.kind=latent has the projections q, kv_down, kv_up, o",
            ),
        ),
        ({"attention": {"kind": "latent", "kv_rank": 8}}, ("value_dim",)),
        ({"moe.shortcut": True}, ("shortcut=true needs a shared expert", "shared_ffn_dim")),
        (
            {"moe.shortcut": True, "moe.shared_ffn_dim": 8, "mixture_of_depths": {"first": 0}},
            ("a dense layer must follow each MoE layer", "moe.every=1", "mixture_of_depths to null"),
        ),
        (
            {"moe.shortcut": True, "moe.shared_ffn_dim": 8, "moe.every": 2, "num_layers": 3, "dense_ffn_dim": 8},
            ("moe.every=2, num_layers=3", "the last layer is dense"),
        ),
    ],
)
def test_each_rule_is_named_with_its_fix(model: dict[str, Any], keys: tuple[str, ...]) -> None:
    with refused(ValidationError, *keys):
        made(**model)
