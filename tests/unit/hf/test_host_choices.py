"""Choices that the tokens of a hosted model do not take, against transformers' own model with slow rules in its routers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.hf.host.family import banks_of
from moe_dist.hf.host.weights import read_folder
from moe_dist.moe.losses import ColumnTables, balance_terms
from moe_dist.plan.policies import expert_groups, replicated_placement
from moe_dist.train.build.hosted import build_hosted
from tests.reference.layer import balance_loss
from tests.support.hosted import FAMILIES, hosted_config
from tests.support.messages import refused

TOKENS = torch.arange(48).view(2, 24) * 7 % 64


def own_and_hosted(tmp_path: Path, family: str, router: dict[str, Any], *, null: int = 0) -> tuple[Any, Any]:
    """Returns transformers' own model, whose router rows are large, and this project's from its folder."""
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
    """Compares logits, and returns those of `model`, those of `own`, and the reports."""
    zeros = torch.zeros_like(TOKENS)
    found, reports = model(TOKENS, torch.arange(24).expand(2, 24), zeros, zeros)
    expected = own(input_ids=TOKENS, use_cache=False).logits
    assert_close(found, expected)
    return found, expected, reports


def top_p(weight_K: Tensor, p: float, *, normalise: bool) -> Tensor:
    """Slow rule: the weights of the choices that a token does not take become 0."""
    taken_K, total = torch.zeros_like(weight_K), 0.0
    for at in sorted(range(len(weight_K)), key=lambda at: -weight_K[at].item()):
        taken_K[at] = float(total == 0.0 or total < p * weight_K.sum().item())
        total += weight_K[at].item()
    return weight_K * taken_K * (weight_K.sum() / (weight_K * taken_K).sum() if normalise else 1.0)


@pytest.mark.parametrize(("family", "normalise"), [("qwen3_moe", "none"), ("deepseek_v3", "true_chosen")])
def test_top_p_equals_weights_of_0(tmp_path: Path, family: str, normalise: str) -> None:
    """DeepSeek-V3's choices are not sorted, and its weights do not add up to 1. A bias of 0.1 stands for a controller."""
    own, model = own_and_hosted(tmp_path, family, {"kind": "top_p", "p": 0.5, "normalise": normalise})

    def mask(_module: Any, _inputs: Any, output: Any) -> Any:
        rows = [top_p(weight_K, 0.6, normalise=normalise == "true_chosen") for weight_K in output[1]]
        return output[0], torch.stack(rows), *output[2:]

    for gate, bank in zip(model.gates, banks_of(own), strict=True):
        gate.bias[:] = 0.1
        own.get_submodule(bank.router).register_forward_hook(mask)
    *logits, reports = outputs(own, model)
    sum(each.square().sum() for each in logits).backward()
    for name, each in own.named_parameters():
        if each.grad is not None:
            assert_close(model.family.get_parameter(name).grad, each.grad)
    chosen = TOKENS.numel() * FAMILIES[family]["num_experts_per_tok"]
    assert TOKENS.numel() < reports[0].counts.choices_LC.sum() < chosen


def adamoe(h_TD: Tensor, rows_CD: Tensor, *, normalise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Slow rule (arXiv 2406.13233, section 3.2): the top 3 of 8 true and further null columns. Returns all logits."""
    logits_TC, table = h_TD.reshape(-1, rows_CD.shape[1]) @ rows_CD.T, []
    for logit_C in logits_TC:
        best = sorted(range(len(logit_C)), key=lambda column: -logit_C[column].item())[:3]
        taken_E = torch.tensor([float(column in best) for column in range(8)])
        exp_E = logit_C[:8].exp()
        table.append(exp_E * taken_E / (exp_E * taken_E if normalise else exp_E).sum().clamp_min(1e-30))
    return logits_TC, *torch.stack(table).topk(3)


@pytest.mark.parametrize(("family", "normalise"), [("mixtral", "true_chosen"), ("olmoe", "true_all")])
def test_null_rows_equal_adamoe(tmp_path: Path, family: str, normalise: str) -> None:
    """Copies of the true rows keep the model. Other null rows give AdaMoE's outputs, balance loss and gradients."""
    own, model = own_and_hosted(tmp_path, family, {"kind": "top_k", "normalise": normalise}, null=8)
    outputs(own, model)
    logits, weights = list[Tensor](), [model.family.get_submodule(bank.router).weight for bank in banks_of(own)]
    for weight_CD in weights:
        weight_CD.data[8:].mul_(torch.rand(8, 1) * 2)
    rows = [each.detach().clone().requires_grad_() for each in weights]
    for bank, rows_CD in zip(banks_of(own), rows, strict=True):

        def choose(_module: Any, inputs: Any, _output: Any, rows_CD: Tensor = rows_CD) -> Any:
            logits_TC, *choice = adamoe(inputs[0], rows_CD, normalise=normalise == "true_chosen")
            logits.append(logits_TC)
            return logits_TC, *choice

        own.get_submodule(bank.router).register_forward_hook(choose)
    found, expected, reports = outputs(own, model)
    tables = ColumnTables.on(model.moe_modules()[0].router.groups, torch.device("cpu"))
    sums = [balance_terms(r.aux.prob_LC, r.counts.choices_LC, r.counts.tokens_LG, tables).sum() for r in reports]
    losses = [balance_loss(logits_TC, 8, 3) for logits_TC in logits]
    assert [each.item() for each in sums] == pytest.approx([each.item() for each in losses], rel=1e-5)
    (found.square().sum() + expected.square().sum() + 100 * sum(sums + losses)).backward()
    for weight_CD, rows_CD in zip(weights, rows, strict=True):
        assert_close(weight_CD.grad, rows_CD.grad)
    assert reports[0].counts.choices_LC[0, 8:].sum() > 0


def test_another_rule_of_weights_is_refused(tmp_path: Path) -> None:
    with refused(ConfigError, "model.moe.router.normalise"):
        own_and_hosted(tmp_path, "olmoe", {"kind": "top_k"}, null=8)
