"""Rules of adapters for the rest of a configuration: errors name field, value, rule and fix."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config.experts.lora import AttentionLoRASection, LoRAExpertsSection
from moe_dist.config.load import load_config
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.model.attention_lora import AttentionLoRA
from moe_dist.moe.experts.lora import LoRAExperts
from moe_dist.plan.preflight import check_file, layout_without_data
from tests.support.tiny import tiny_config, write_config

GROUPS = {
    "text": {"num_experts": 3, "num_null": 1, "top_k": 1, "ffn_dim": 16},
    "image": {"num_experts": 2, "top_k": 2, "ffn_dim": 16},
}
LORA = {"kind": "lora", "rank": 2, "alpha": 4.0}
SOUND: dict[str, Any] = {
    "run.init_from": "runs/base",
    "run.init_rules": ["adapt"],
    "model.moe.groups": GROUPS,
    "model.moe.experts": LORA,
    "model.moe.router": {"normalise": "none"},
    "placement.policy": "interleaved",
    "train.only": "adapters",
}
ATTENTION: dict[str, Any] = {
    "run.init_from": "runs/base",
    "run.init_rules": ["adapt"],
    "model.attention_lora": {"rank": 2, "alpha": 4.0},
    "train.only": "adapters",
}


def config(changes: dict[str, Any]) -> Config:
    return tiny_config(Path("none"), Path("runs"), changes)


def test_what_fits_passes_and_every_rank_holds_all_experts() -> None:
    layout = layout_without_data(config({**SOUND, "parallel.ep": 4, "parallel.edp": 1, "model.attention_lora": LORA_ALONE}))
    assert layout.placement.slots == ((0, 1, 2, 3, 4),)
    assert layout_without_data(config(ATTENTION)).placement.num_ranks == 2


LORA_ALONE = {"rank": 2, "alpha": 4.0, "targets": ["q"]}


@pytest.mark.parametrize(
    ("changes", "text", "way_out"),
    [
        ({**SOUND, "train.only": None}, "train.only=null: the weights under adapters", "set train.only=adapters"),
        ({**ATTENTION, "train.only": None}, "train.only=null: the weights under adapters", "set train.only=adapters"),
        ({**SOUND, "train.frozen": "routers"}, "train.only=adapters says already what", "leave one of the two out"),
        ({"train.frozen": "routers"}, "run.init_from=null leaves routers", "or frozen to null"),
        ({**SOUND, "run.init_from": None}, "run.init_from=null leaves it untrained", "set run.init_from to a checkpoint"),
        ({**SOUND, "run.init_rules": []}, "run.init_rules=[]: a base under adapters", "set run.init_rules=[adapt]"),
        ({**SOUND, "run.init_rules": ["adapt", "upcycle"]}, "under adapters the base stays", "remove the other rules"),
        ({"train.only": "adapters", "run.init_from": "x", "run.init_rules": ["adapt"]},
         "train.only=adapters: the model has no adapters", "set model.moe.experts to {kind: lora, ...} or model"),
        ({"run.init_from": "x", "run.init_rules": ["adapt"]}, "adapt puts adapters on a frozen base", "remove the rule"),
        ({**SOUND, "model.moe.router": {"kind": "expert_choice", "causal": "threshold"},
          "loss.balance.schedule": [[0, 0.0]]},
         "model.moe.router.kind=expert_choice: adapters need a base", "set model.moe.router.kind=top_k"),
        ({**ATTENTION, "model.moe.router": {"kind": "expert_choice", "causal": "threshold"},
          "loss.balance.schedule": [[0, 0.0]]},
         "model.moe.router.kind=expert_choice: adapters need a base", "set model.moe.router.kind=top_k"),
        ({**SOUND, "model.moe.router": {}}, "router.normalise=true_chosen", "set model.moe.router.normalise=none"),
        ({**SOUND, "model.moe.router": {"normalise": "none", "scale": 2.0}}, "model.moe.router.scale=2",
         "set model.moe.router.scale=1"),
        ({**SOUND, "model.moe.capacity": {"factor": 1.0}}, "model.moe.capacity: model.moe.experts.kind=lora: every rank",
         "set model.moe.capacity=null"),
        ({**SOUND, "model.moe.groups": {**GROUPS, "image": {"num_experts": 2, "top_k": 1, "ffn_dim": 24}}},
         "ffn_dim is text: 16, image: 24; all groups adapt the same FFN", "give each group the width of the base"),
        ({**SOUND, "model.moe.groups": {**GROUPS, "text": {**GROUPS["text"], "num_identity": 1}}},
         "model.moe.groups.text: num_identity=1", "set both to 0"),
        ({**SOUND, "model.moe.shared_ffn_dim": 8}, "model.moe.shared_ffn_dim=8", "set model.moe.shared_ffn_dim=0"),
        ({**SOUND, "placement.policy": "pinned"}, "placement.policy=pinned: model.moe.experts.kind=lora: every rank",
         "set placement.policy=interleaved"),
        ({**SOUND, "parallel.dispatch": {"kind": "all_to_all", "overlap": True}}, "parallel.dispatch: model.moe.experts",
         "set parallel.dispatch={"),
        ({**SOUND, "parallel.expert_pair_budget": 10}, "parallel.expert_pair_budget=10: model.moe.experts.kind=lora",
         "set parallel.expert_pair_budget=null"),
        ({**SOUND, "parallel.check_exchanges": True}, "parallel.check_exchanges=true: model.moe.experts.kind=lora",
         "set parallel.check_exchanges=false"),
        (
            {**SOUND, "model.mixture_of_depths": {"capacity": 0.5}},
            "model.mixture_of_depths: neither a frozen base",
            "set it to null",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict[str, Any], text: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as told:
        layout_without_data(config(changes))
    assert text in str(told.value)
    assert way_out in str(told.value)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.moe.experts.rank=0", "model.moe.experts.rank=0: must be whole number, 1 or more"),
        ("model.moe.experts.alpha=-1", "model.moe.experts.alpha=-1"),
        ("model.moe.experts.dropout=1", "model.moe.experts.dropout=1"),
        ("model.moe.experts.targets=[gate, q]", "model.moe.experts.targets.1='q'"),
        ("model.moe.experts.targets=[]", "model.moe.experts: targets=[]: name at least one target"),
        ("model.attention_lora.targets=[q, q]", "model.attention_lora: targets=['q', 'q']: name each target once"),
        ("model.attention_lora.targets=[query]", "model.attention_lora.targets.0='query'"),
        ("model.moe.experts.weight=hard", "model.moe.experts.weight='hard'"),
        ("model.moe.experts.kind=dora", "model.moe.experts.kind='dora'"),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path: Path, override: str, text: str) -> None:
    path = write_config(config({**SOUND, "model.attention_lora": LORA_ALONE}), tmp_path / "config.yaml")
    with pytest.raises(ConfigError) as told:
        check_file(path, [override])
    assert text in str(told.value)


def test_configurations_of_before_mean_what_they_did(tmp_path: Path) -> None:
    values = config({})
    assert values.model.moe.experts.kind == "ffn"
    assert values.model.attention_lora is None
    path = write_config(values, tmp_path / "config.yaml")
    text = path.read_text().replace("    experts:\n      kind: ffn\n", "").replace("  attention_lora: null\n", "")
    assert "ffn\n" not in text
    path.write_text(text)
    assert load_config(path) == values


@pytest.mark.parametrize(
    ("section", "module", "own"),
    [(LoRAExpertsSection, LoRAExperts, {"kind"}), (AttentionLoRASection, AttentionLoRA, {"targets"})],
)
def test_fields_are_the_constructors_keywords(section: Any, module: Any, own: set[str]) -> None:
    assert set(section.model_fields) - own <= set(inspect.signature(module.__init__).parameters)
