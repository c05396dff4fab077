"""Megatron-LM's --spec with our name builds the layer from the file that the environment variable names."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

from moe_dist.errors import ConfigError
from moe_dist.megatron.cpu_trial import megatron_on_cpu
from moe_dist.megatron.tensors import pieces
from moe_dist.placement.parameter_names import Role, role_of_name
from tests.support.megatron_model import MOE_LAYERS, Layout, gpt_model, place_of, transformer_config
from tests.support.megatron_run import megatron
from tests.support.worlds import RankContext

pytestmark = pytest.mark.megatron

EXPERTS = """
groups:
  text: {num_experts: 5, num_null: 3, top_k: 3, ffn_dim: 6}
  image: {num_experts: 3, num_null: 2, top_k: 2, ffn_dim: 10}
seed: 4
"""


def built_by_name(rank: RankContext, eps: list[int]) -> list[dict[str, np.ndarray]]:
    """Returns, for each EP size, this rank's initial weights of routers and experts by logical name."""
    file = Path(rank.folder) / f"experts_{rank.rank}.yaml"
    file.write_text(EXPERTS)
    os.environ["MOE_DIST_EXPERTS"] = str(file)
    weights: list[dict[str, np.ndarray]] = []
    try:
        for ep in eps:
            layout = Layout(ep=ep)
            with megatron(layout) as state:
                from megatron.core.transformer.spec_utils import import_module

                spec = import_module(("moe_dist.megatron.decoder_layer", "decoder_layer"))
                model, place = gpt_model(transformer_config(layout), spec), place_of(layout, state)
                held = [
                    piece
                    for name, parameter in model.named_parameters()
                    for piece in pieces(name, parameter, place, first_layer=0)
                ]
                drawn = (piece for piece in held if role_of_name(piece.name) in (Role.ROUTER, Role.EXPERT))
                weights.append({piece.name: piece.get().numpy() for piece in drawn})
    finally:
        del os.environ["MOE_DIST_EXPERTS"]
    return weights


def test_builds_by_name_and_every_layout_starts_equal(run_in_world: Callable[..., list[Any]]) -> None:
    results = run_in_world(4, built_by_name, [1, 4])
    together: dict[str, np.ndarray] = {}
    for alone, parted in results:
        assert len(alone) == len(MOE_LAYERS) * (4 + 8 * 3)  # two gates with null rows, and eight experts of three matrices
        together.update(parted)
        for name, weight in parted.items():
            np.testing.assert_array_equal(weight, alone[name])
        values = np.concatenate([weight.ravel() for weight in alone.values()])
        assert len(np.unique(values)) > 0.99 * len(values)  # no two experts have the same initial weights
    assert together.keys() == results[0][0].keys()


def test_expert_tensor_parallel_groups_are_refused() -> None:
    with megatron_on_cpu():
        from moe_dist.megatron.expert_layer import _check_groups

    groups: Any = SimpleNamespace(expt_tp=SimpleNamespace(size=lambda: 2))
    with pytest.raises(ConfigError, match="expert tensor parallel group of 2 ranks"):
        _check_groups(groups)


def test_torchs_device_contexts_work_afterwards() -> None:
    """torch caches its list of tensor constructors at the first use. This list must not contain stand-ins."""
    _device_constructors.cache_clear()
    with megatron_on_cpu(), torch.device("meta"):
        torch.ones(1)
    with torch.device("meta"):
        assert torch.empty(1).is_meta
