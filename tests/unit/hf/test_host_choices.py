"""Routers that drop some choices of a hosted model equal slow rules in the routers of transformers' own model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.hf.host.banks import banks_of
from moe_dist.hf.host.weights import read_folder
from moe_dist.moe.losses import ColumnTables, balance_terms
from moe_dist.plan.policies import expert_groups, replicated_placement
from moe_dist.train.build.hosted import build_hosted
from tests.reference.layer import balance_loss, choose, weights_of
from tests.support.hosted import FAMILIES, hosted_config
from tests.support.messages import refused

TOKENS = torch.arange(48).view(2, 24) * 7 % 64


def own_and_hosted(tmp_path: Path, family: str, router: dict[str, Any], *, null: int = 0) -> tuple[Any, Any]:
    """Returns transformers' own model with large router rows, and the hosted model that is loaded from its folder."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FAMILIES[family]), dtype=torch.float32)
    own.set_experts_implementation("eager")
    for bank in banks_of(own):
        own.get_submodule(bank.router).weight.data.mul_(20.0)
    own.save_pretrained(tmp_path / "folder")
    section = {"moe": {"groups": {"experts": {"num_null": null, "top_k": 3}}}} if null else {}
    changes = {"parallel.ep": 1, "model.moe.router": router}
    config = hosted_config(tmp_path, tmp_path, {"folder": str(tmp_path / "folder"), **section}, changes)
    placement = replicated_placement(expert_groups(config.model.moe))
    model = build_hosted(config, placement, ep_rank=0, ep_group=None)
    model.reset_buffers()
    read_folder(model, tmp_path / "folder", placement.slots[0])
    model.ready()
    return own.train(), model


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 + 1e-3 * float(expected.detach().abs().max()))


def outputs(own: Any, model: Any) -> tuple[Tensor, Tensor, Any]:
    """Compares the logits of both models. Returns the logits of `model`, the logits of `own`, and the layers' reports."""
    zeros = torch.zeros_like(TOKENS)
    found, reports = model(TOKENS, torch.arange(24).expand(2, 24), zeros, zeros)
    expected = own(input_ids=TOKENS, use_cache=False).logits
    assert_close(found, expected)
    return found, expected, reports


def top_p(_logit_C: Tensor, weight_K: Tensor, id_K: Tensor, normalise: str) -> dict[int, Tensor]:
    """Slow rule of top-p: keeps the choices with the largest weights until their sum is 0.6 of the sum of all weights."""
    taken, total = dict[int, Tensor](), 0.0
    for weight, expert in sorted(zip(weight_K, id_K.tolist(), strict=True), key=lambda pair: -pair[0].item()):
        if not taken or total < 0.6 * weight_K.sum().item():
            taken[expert] = weight
        total += weight.item()
    factor = weight_K.sum() / sum(taken.values()) if normalise == "true_chosen" else 1.0
    return {expert: weight * factor for expert, weight in taken.items()}


def adamoe(logit_C: Tensor, _weight_K: Tensor, _id_K: Tensor, normalise: str) -> dict[int, Tensor]:
    """Slow rule of AdaMoE (arXiv 2406.13233, section 3.2): of the top 3 of 8 true and 8 null columns, keeps true ones."""
    return weights_of(logit_C, choose(logit_C.tolist(), 8, 3), 8, normalise)


@pytest.mark.parametrize(
    ("family", "rule", "normalise"),
    [
        ("qwen3_moe", top_p, "none"),
        ("deepseek_v3", top_p, "true_chosen"),  # choices are unsorted; weights do not sum to 1
        ("mixtral", adamoe, "true_chosen"),
        ("olmoe", adamoe, "true_all"),
    ],
)
def test_choices_equal_a_slow_rule(tmp_path: Path, family: str, rule: Any, normalise: str) -> None:
    """Compares outputs, gradients and, with null experts, the balance loss. A bias of 0.1 replaces top-p's controller."""
    null, logits = 8 if rule is adamoe else 0, list[Tensor]()
    router = {"kind": "top_k"} if null else {"kind": "top_p", "p": 0.5}
    own, model = own_and_hosted(tmp_path, family, {**router, "normalise": normalise}, null=null)
    if null:
        outputs(own, model)  # null rows that copy true rows change no output

    def choices(_module: Any, _inputs: Any, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits.append(output[0])
        rows = [rule(*each, normalise) for each in zip(*output[:3], strict=True)]
        weights = [torch.stack([*row.values(), *[torch.zeros(())] * (3 - len(row))]) for row in rows]
        return output[0], torch.stack(weights), torch.tensor([[*row, *[0] * (3 - len(row))] for row in rows])

    for gate, bank in zip(model.gates, banks_of(own), strict=True):
        for bias in gate.buffers():
            bias[:] = 0.1
        theirs, weight_CD = own.get_submodule(bank.router), model.family.get_submodule(bank.router).weight
        weight_CD.data[8:].mul_(2 * torch.rand(null, 1))
        theirs.weight = torch.nn.Parameter(weight_CD.detach().clone())
        theirs.register_forward_hook(choices)
    found, expected, reports = outputs(own, model)
    loss = found.square().sum() + expected.square().sum()
    counts, chosen = reports[0].counts.choices_LC, TOKENS.numel() * (3 if null else FAMILIES[family]["num_experts_per_tok"])
    assert TOKENS.numel() / 2 < counts[0, :8].sum() < chosen
    if null:
        tables = ColumnTables.on(model.moe_modules()[0].router.groups, torch.device("cpu"))
        sums = [balance_terms(r.aux.prob_LC, r.counts.choices_LC, r.counts.tokens_LG, tables).sum() for r in reports]
        losses = [balance_loss(logits_TC, 8, 3) for logits_TC in logits]
        assert [each.item() for each in sums] == pytest.approx([each.item() for each in losses], rel=1e-5)
        loss = loss + 100 * sum(sums + losses)
    loss.backward()
    for name, each in own.named_parameters():
        if each.grad is not None:
            assert_close(model.family.get_parameter(name).grad, each.grad)


def test_another_rule_of_weights_is_refused(tmp_path: Path) -> None:
    with refused(ConfigError, "model.moe.router.normalise"):
        own_and_hosted(tmp_path, "olmoe", {"kind": "top_k"}, null=8)
