"""Splits a dense FFN into experts, whose sum is the FFN. The router prefers the experts that contribute most."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moe_dist.config.load import load_config
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from research.experiments.split_base import SPREAD, cluster, cut, regression, split_config

BASE = Path(__file__).parents[2] / "configs/reproduce/base.yaml"
D, WIDTH, EXPERTS, TOKENS = 16, 24, 4, 600


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_all_experts_together_are_the_ffn() -> None:
    x_TD, gate_FD, up_FD, down_DF = random(TOKENS, D), random(WIDTH, D, seed=1), random(WIDTH, D, seed=2), random(D, WIDTH)
    parts = cut(x_TD, gate_FD, up_FD, down_DF, experts=EXPERTS)
    assert sorted(parts.neurons_nN.flatten().tolist()) == list(range(WIDTH)), "each neuron once"
    assert parts.rows_nD.shape == (EXPERTS, D)
    hidden_TF = F.silu(x_TD @ gate_FD.T) * (x_TD @ up_FD.T)
    whole = hidden_TF @ down_DF.T
    summed = sum(hidden_TF[:, neurons] @ down_DF[:, neurons].T for neurons in parts.neurons_nN)
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-4)


def test_neurons_of_the_same_tokens_share_an_expert() -> None:
    """Neuron i belongs to kind i % 4, and neurons of a kind are active for the same tokens."""
    own_FT = (torch.arange(WIDTH)[:, None] % EXPERTS == torch.arange(80)[None] % EXPERTS).float()
    found = cluster(own_FT + 0.1 * random(WIDTH, 80).abs(), experts=EXPERTS)
    assert {tuple(sorted({neuron % EXPERTS for neuron in neurons})) for neurons in found.tolist()} == {
        (0,),
        (1,),
        (2,),
        (3,),
    }


def test_logits_predict_and_are_small() -> None:
    x_TD, truth_nD = random(TOKENS, D), random(EXPERTS, D, seed=5)
    wanted_Tn = x_TD @ truth_nD.T + 7.0
    logits_Tn = x_TD @ regression(x_TD, wanted_Tn).T
    assert (logits_Tn.argmax(1) == wanted_Tn.argmax(1)).float().mean() > 0.95
    assert float((logits_Tn - logits_Tn.mean(1, keepdim=True)).std()) == pytest.approx(SPREAD, rel=1e-3)


def dense_config(ffn_dim: int = 32, num_experts: int = 1) -> Config:
    group = f"{{num_experts: {num_experts}, top_k: 1, ffn_dim: {ffn_dim}, modalities: [text, image]}}"
    return load_config(BASE, [f"model.moe.groups={{all: {group}}}"])


def test_the_weights_of_a_tokens_experts_sum_to_their_number() -> None:
    found = split_config(dense_config(), experts=8, top_k=6).model.moe
    (group,) = found.groups.values()
    assert (group.num_experts, group.top_k, group.ffn_dim) == (8, 6, 4)
    assert (found.router.scale, found.router.normalise) == (6.0, "true_chosen")  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("config", "experts", "top_k"),
    [(dense_config(num_experts=2), 8, 6), (dense_config(ffn_dim=30), 8, 6), (dense_config(), 8, 8), (dense_config(), 8, 1)],
    ids=["mixture", "width", "all", "one"],
)
def test_models_that_cannot_be_cut_are_refused(config: Config, experts: int, top_k: int) -> None:
    with pytest.raises(ConfigError, match="takes a dense import whose FFN width"):
        split_config(config, experts=experts, top_k=top_k)
