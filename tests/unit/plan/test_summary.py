"""Tests the lines that a run prints at its start."""

from dataclasses import replace

from moe_dist.config.load import load_config
from moe_dist.plan.preflight import layout_without_data
from moe_dist.plan.summary import start_text
from moe_dist.train.start.dry_run import estimate


def test_the_start_says_model_data_and_where_to_look() -> None:
    config = load_config("adamoe_moma_tiny_cpu", ["data.path=/none", "model.moe.groups.image.num_identity=2"])
    layout = layout_without_data(config)
    assert "Data: /none; 800 steps" in start_text(layout, "runs/x", "runs"), "the mix of absent data is unknown"
    layout = replace(layout, token_mix={"text": 300, "image": 100})
    model, experts, ranks, data, follow, charts = start_text(layout, "runs/x", "runs").splitlines()
    result = estimate(config)
    assert (
        f"{result.parts.total / 1e6:.2f} M parameters, of which a token uses {result.active_parameters / 1e6:.2f} M"
        in model
    )
    assert experts == "Experts: text: top 4 of 8 + 24 null; image: top 4 of 8 + 24 null + 2 identity or constant"
    assert ranks == "Ranks: 4 (engine moe_dist: ep 4 x edp 1)"
    assert data == "Data: /none (text 75%, image 25%); 800 steps of 8 x 240 tokens"
    assert follow == "Follow it: moe-dist status runs/x"
    assert charts == "Charts: tensorboard --logdir runs, then http://localhost:6006/#custom_scalars"
