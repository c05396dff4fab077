"""Megatron-LM's --spec with our name builds the layer from the file that the environment variable names."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_dist.errors import ConfigError
from moe_dist.megatron.cpu_trial import megatron_on_cpu
from moe_dist.placement.parameter_names import group_module
from tests.support.megatron_model import MOE_LAYERS, Layout, gpt_model, transformer_config, with_layers_of
from tests.support.megatron_run import megatron
from tests.support.worlds import RankContext

EXPERTS = """
groups:
  text: {num_experts: 5, num_null: 3, top_k: 3, ffn_dim: 6}
  image: {num_experts: 3, num_null: 2, top_k: 2, ffn_dim: 10}
seed: 4
"""


def built_by_name(rank: RankContext, eps: list[int]) -> tuple[str, list[dict[str, np.ndarray]]]:
    """Returns Megatron's version, and for each EP size this rank's initial weights by logical name."""
    file = Path(rank.folder) / f"experts_{rank.rank}.yaml"
    file.write_text(EXPERTS)
    os.environ["MOE_DIST_EXPERTS"] = str(file)
    weights: list[dict[str, np.ndarray]] = []
    try:
        for ep in eps:
            with megatron(Layout(ep=ep)):
                from megatron.core import package_info
                from megatron.core.transformer.spec_utils import import_module

                spec = import_module(("moe_dist.megatron.decoder_layer", "decoder_layer"))
                weights.append(named_weights(gpt_model(transformer_config(Layout(ep=ep)), spec)))
    finally:
        del os.environ["MOE_DIST_EXPERTS"]
    return package_info.__version__, weights  # pyright: ignore[reportPossiblyUnboundVariable]


def named_weights(model: Any) -> dict[str, np.ndarray]:
    named: dict[str, np.ndarray] = {}
    for layer in with_layers_of(model):
        for name, weight in layer.moe.router.named_parameters():
            named[f"{layer.layer_number}.{name}"] = weight.detach().numpy().copy()
        for group in layer.placement.groups:
            local = layer.placement.local_experts(layer.ep_rank, group)
            for name, stack in layer.moe.experts.get_submodule(group_module(group.name)).named_parameters():
                for expert, weight in zip(local, stack, strict=True):
                    named[f"{layer.layer_number}.{expert}.{name}"] = weight.detach().numpy().copy()
    return named


def test_builds_by_name_and_every_layout_starts_equal(
    run_with_megatron: Callable[..., list[Any]], request: pytest.FixtureRequest
) -> None:
    results = run_with_megatron(4, built_by_name, [1, 4])
    together: dict[str, np.ndarray] = {}
    for version, (alone, parted) in results:
        if "0.19" in request.node.name:
            assert version.startswith("0.19.")
        assert len(alone) == len(MOE_LAYERS) * (4 + 8 * 3)  # two gates with null rows, eight experts of three matrices
        together.update(parted)
        for name, weight in parted.items():
            np.testing.assert_array_equal(weight, alone[name])
        values = np.concatenate([weight.ravel() for weight in alone.values()])
        assert len(np.unique(values)) > 0.99 * len(values)  # no two experts start equal
    assert together.keys() == results[0][1][0].keys()


def test_expert_tensor_parallel_groups_are_refused() -> None:
    with megatron_on_cpu():
        from moe_dist.megatron.expert_layer import _check_groups

    groups: Any = SimpleNamespace(expt_tp=SimpleNamespace(size=lambda: 2))
    with pytest.raises(ConfigError, match="expert tensor parallel group of 2 ranks"):
        _check_groups(groups)
