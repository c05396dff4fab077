"""Rules between adapters of either kind (LoRA experts, `model.attention_lora`) and the rest of a configuration. No
torch."""

from collections.abc import Iterator

from moe_dist.config.schema import Config
from moe_dist.config.section import Violation

EXPERTS = "model.moe.experts.kind"


def lora_violations(config: Config) -> Iterator[Violation]:
    """Violated rules of adapters and of `train.only=adapters`."""
    yield from _stage_violations(config)
    if config.model.has_adapters and config.model.mixture_of_depths is not None:
        problem = "model.mixture_of_depths: a frozen base has no routers of depths, and adapters bring none; set it to null"
        yield Violation(("model.mixture_of_depths", "train.only"), problem)
    router = config.model.moe.router
    if config.model.has_adapters and not router.softmax_top_k:
        problem = (
            f"{router.name}: adapters stand on a base whose tokens choose their experts; set "
            "model.moe.router.kind=top_k, which the base must have"
        )
        yield Violation(("model.moe.router.kind", "train.only"), problem)


def _stage_violations(config: Config) -> Iterator[Violation]:
    """Adapters, their base, and freezing of the base must be configured together."""
    only, rules, there = config.train.only, config.run.init_rules, config.model.has_adapters
    if there and only != "adapters":
        problem = (
            f"train.only={only or 'null'}: what lies under adapters (model.moe.experts.kind=lora, model.attention_lora) is "
            "frozen, and they alone are saved; set train.only=adapters"
        )
        yield Violation(("train.only", EXPERTS, "model.attention_lora"), problem)
    if only == "adapters" and not there:
        problem = (
            "train.only=adapters: the model has none; set model.moe.experts to {kind: lora, ...} or model.attention_lora, "
            "or train.only=null"
        )
        yield Violation(("train.only", EXPERTS, "model.attention_lora"), problem)
    if only == "adapters" and config.run.init_from is None:
        problem = (
            "train.only=adapters: freezes the base, and run.init_from=null leaves it untrained; set run.init_from to a "
            "checkpoint of the base (a run, or what tools.import_hf made)"
        )
        yield Violation(("train.only", "run.init_from"), problem)
    if only == "adapters" and rules != ("adapt",):
        problem = (
            f"run.init_rules={list(rules)}: the base under adapters is taken whole, by one rule; set run.init_rules=[adapt]"
        )
        yield Violation(("run.init_rules", "train.only"), problem)
    if only != "adapters" and "adapt" in rules:
        problem = "run.init_rules: adapt puts adapters on a frozen base; set train.only=adapters, or leave the rule out"
        yield Violation(("run.init_rules", "train.only"), problem)
