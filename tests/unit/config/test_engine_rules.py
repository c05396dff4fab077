"""Rules of the Megatron-Core engine for the rest of a configuration."""

from pathlib import Path
from typing import Any

import pytest

from moe_dist.config.engines.megatron import NEEDED, MegatronEngineSection
from moe_dist.errors import ConfigError
from moe_dist.plan import host
from moe_dist.plan.preflight import check
from tests.support.engine_run import config_of, megatron
from tests.support.messages import refused

FOUR = {"parallel.ep": 2, "parallel.edp": 2}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({**FOUR, **megatron(tp=3)}, ["engine.tp=3", "must divide the 4 ranks", "model.vocab_size=64", "data.seq_len=64"]),
        ({"parallel.ep": 4, **megatron(pp=2)}, ["parallel.edp=1: must be a multiple of engine.pp=2"]),
        ({**FOUR, "model.num_layers": 3, **megatron(pp=2)}, ["model.num_layers=3: must be a multiple of engine.pp=2"]),
        ({**FOUR, **megatron(vpp=2)}, ["engine.vpp=2: there is no pipeline"]),
        ({**FOUR, "train.global_batch": 6, **megatron(tp=2, pp=2, vpp=2)}, ["engine.vpp=2", "gives 3"]),
        ({**FOUR, "data.seq_len": 62, **megatron(cp=2)}, ["data.seq_len=62: must be a multiple of 4"]),
        (
            {**FOUR, "train.global_batch": 2, **megatron(tp=2)},
            ["train.global_batch=2", "2 ranks (parallel.ep x parallel.edp /"],
        ),
        ({**FOUR, "engine": {"kind": "megatron", "tp": 2}}, ["parallel.device=cpu: Megatron has no CPU path"]),
        ({**FOUR, "parallel.device": "cuda", **megatron()}, ["parallel.device=cuda", "(here true)"]),
    ],
    ids=["ranks", "stage", "layers", "no pipeline", "interleaved", "pieces", "batch", "no trial", "trial on cuda"],
)
def test_degrees_that_do_not_fit_are_refused(tiny_data: Path, changes: dict[str, Any], keys: list[str]) -> None:
    with refused(ConfigError, *keys):
        check(config_of(tiny_data, "runs", changes))


def test_all_that_megatron_cannot_express_is_told_at_once(tiny_data: Path) -> None:
    groups = {
        "text": {"num_experts": 3, "num_identity": 1, "top_k": 2, "ffn_dim": 16},
        "image": {"num_experts": 2, "num_null": 2, "top_k": 2, "ffn_dim": 24},
    }
    changes = {
        **FOUR,
        **megatron(tp=2),
        "model.qk_norm": "head",
        "model.moe.groups": groups,
        "loss.balance.scope": "step",
        "rank_balance.dealing": True,
        "rank_balance.moving": {},
        "parallel.deterministic": True,
        "parallel.recompute": "block",
        "parallel.compile": True,
        "monitor.profile": {"steps": [1, 2]},
        "run.init_from": "elsewhere",
        "run.init_rules": ["copy_nulls"],
    }
    keys = [key for key in changes if key not in ("engine", "model.moe.groups", "run.init_from", *FOUR)]
    with refused(ConfigError, "model.moe.groups.text.num_identity=1", *keys):
        check(config_of(tiny_data, "runs", changes))


def test_experts_choose_among_whole_micro_batches(tiny_data: Path) -> None:
    router = {"kind": "expert_choice", "causal": "threshold", "scope": "ep_group"}
    groups = {name: {"num_experts": 4, "top_k": 2, "ffn_dim": 16} for name in ("text", "image")}
    off = {"loss.balance.schedule": [[0, 0.0]], "loss.z": 0.0}
    changes = {**FOUR, **off, "model.moe.groups": groups, "model.moe.router": router}
    with refused(ConfigError, "model.moe.router.scope=ep_group: engine.kind=megatron", "set scope=rank"):
        check(config_of(tiny_data, "runs", {**changes, **megatron(tp=2)}))
    check(config_of(tiny_data, "runs", {**changes, **megatron(pp=2)}))


def test_every_rule_allows_the_value_that_it_advises(tiny_data: Path) -> None:
    config = config_of(tiny_data, "runs", {**FOUR, **megatron(tp=2)})
    for key, allowed, _ in NEEDED:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        assert value in allowed, key


@pytest.mark.megatron
@pytest.mark.parametrize("package", MegatronEngineSection.needs_modules)
def test_a_missing_package_is_told(tiny_data: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(host, "installed", lambda module: module != package)
    with refused(ConfigError, f"engine.kind=megatron: the package {package} is not installed"):
        check(config_of(tiny_data, "runs", {**FOUR, **megatron(tp=2)}))


def test_the_default_engine_is_this_projects_own(tiny_data: Path) -> None:
    assert config_of(tiny_data, "runs", FOUR).engine.kind == "moe_dist"
