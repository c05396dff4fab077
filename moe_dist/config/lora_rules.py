"""What adapters (`model.moe.experts.kind=lora`, `model.attention_lora`) demand of the rest of a configuration. No torch."""

from collections.abc import Iterator
from typing import Any

from moe_dist.config.lora_schema import LoRAExpertsSection
from moe_dist.config.model_schema import ModelSection
from moe_dist.config.parallel_schema import AllToAllDispatchSection, InterleavedSection
from moe_dist.config.schema import Config
from moe_dist.config.section import Violation

EXPERTS = "model.moe.experts.kind"
GUIDE = "docs/lora-experts.md"


def has_lora_experts(model: ModelSection) -> bool:
    return isinstance(model.moe.experts, LoRAExpertsSection)


def has_adapters(model: ModelSection) -> bool:
    return has_lora_experts(model) or model.attention_lora is not None


def largest_dropout(model: ModelSection) -> float:
    """Of all adapters; 0 without any."""
    experts, attention = model.moe.experts, model.attention_lora
    return max(experts.dropout if isinstance(experts, LoRAExpertsSection) else 0.0, attention.dropout if attention else 0.0)


def lora_violations(config: Config) -> list[Violation]:
    """Rules of adapters and of `train.only=adapters` that do not hold."""
    broken = _stage_violations(config)
    if has_adapters(config.model) and config.model.mixture_of_depths is not None:
        problem = "model.mixture_of_depths: a frozen base has no routers of depths, and adapters bring none; set it to null"
        broken.append(Violation(("model.mixture_of_depths", "train.only"), problem))
    router = config.model.moe.router
    if has_adapters(config.model) and router.kind != "top_k":
        problem = (
            f"model.moe.router.kind={router.kind}: adapters stand on a base whose tokens choose their experts; set "
            "model.moe.router.kind=top_k, which the base must have"
        )
        broken.append(Violation(("model.moe.router.kind", "train.only"), problem))
    elif has_lora_experts(config.model):
        broken += [*_routing_violations(config), *_group_violations(config), *_sharding_violations(config)]
    return broken


def _stage_violations(config: Config) -> list[Violation]:
    """Adapters, a base under them, and a frozen base belong together."""
    only, rules, broken = config.train.only, config.run.init_rules, []
    there = has_adapters(config.model)
    if there and only != "adapters":
        problem = (
            f"train.only={only or 'null'}: what lies under adapters (model.moe.experts.kind=lora, model.attention_lora) is "
            "frozen, and they alone are saved; set train.only=adapters"
        )
        broken.append(Violation(("train.only", EXPERTS, "model.attention_lora"), problem))
    if only == "adapters" and not there:
        problem = (
            "train.only=adapters: the model has none; set model.moe.experts to {kind: lora, ...} or model.attention_lora, "
            "or train.only=null"
        )
        broken.append(Violation(("train.only", EXPERTS, "model.attention_lora"), problem))
    if only == "adapters" and config.run.init_from is None:
        problem = (
            "train.only=adapters: freezes the base, and run.init_from=null leaves it untrained; set run.init_from to a "
            "checkpoint of the base (a run, or what tools.import_hf made)"
        )
        broken.append(Violation(("train.only", "run.init_from"), problem))
    if only == "adapters" and rules != ("adapt",):
        problem = (
            f"run.init_rules={list(rules)}: the base under adapters is taken whole, by one rule; set run.init_rules=[adapt]"
        )
        broken.append(Violation(("run.init_rules", "train.only"), problem))
    if only != "adapters" and "adapt" in rules:
        problem = "run.init_rules: adapt puts adapters on a frozen base; set train.only=adapters, or leave the rule out"
        broken.append(Violation(("run.init_rules", "train.only"), problem))
    return broken


def _routing_violations(config: Config) -> Iterator[Violation]:
    moe, key = config.model.moe, "model.moe.router"
    router = moe.router
    if router.kind != "top_k":
        return
    if router.normalise != "none":
        yield Violation(
            (f"{key}.normalise", EXPERTS),
            f"{key}.normalise={router.normalise}: how LoRA experts are weighted is said by model.moe.experts.weight, over "
            f"the softmax of all columns; set {key}.normalise=none",
        )
    if router.scale != 1.0:
        problem = f"{key}.scale={router.scale:g}: the factor of LoRA experts is model.moe.experts.alpha; set {key}.scale=1"
        yield Violation((f"{key}.scale", EXPERTS), problem)
    if moe.capacity is not None:
        problem = (
            "model.moe.capacity: LoRA experts are on every rank, where no load is too uneven, so that dropping pairs gains "
            "nothing; set it to null"
        )
        yield Violation(("model.moe.capacity", EXPERTS), problem)


def _group_violations(config: Config) -> Iterator[Violation]:
    moe = config.model.moe
    widths = {name: group.ffn_dim for name, group in moe.groups.items()}
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{name}: {width}" for name, width in widths.items())
        problem = f"model.moe.groups: ffn_dim is {said}; all groups adapt the same FFN: give each the width of the base's"
        yield Violation(("model.moe.groups", EXPERTS), problem)
    for name, group in moe.groups.items():
        if group.num_identity or group.num_constant:
            problem = (
                f"model.moe.groups.{name}: num_identity={group.num_identity}, num_constant={group.num_constant}: beside "
                "LoRA experts the choice that costs nothing is a null expert, the frozen FFN alone; set both to 0"
            )
            yield Violation((f"model.moe.groups.{name}", EXPERTS), problem)
    if moe.shared_ffn_dim:
        problem = (
            f"model.moe.shared_ffn_dim={moe.shared_ffn_dim}: the frozen FFN is what all tokens share, and the base has no "
            "other; set it to 0"
        )
        yield Violation(("model.moe.shared_ffn_dim", EXPERTS), problem)


def _sharding_violations(config: Config) -> Iterator[Violation]:
    """LoRA experts are replicated: what places or sends experts has nothing to do."""
    why = (
        "LoRA experts are on every rank: sending a token to one would move rows of model.hidden_dim for products of rank r "
        f"({GUIDE})"
    )
    if not isinstance(config.placement, InterleavedSection):
        problem = f"placement.policy={config.placement.policy}: {why}; leave placement out"
        yield Violation(("placement", EXPERTS), problem)
    parallel = config.parallel
    if parallel.dispatch != AllToAllDispatchSection():
        problem = f"parallel.dispatch: {why}; leave it out"
        yield Violation(("parallel.dispatch", EXPERTS), problem)
    unused: dict[str, Any] = {
        "expert_pair_budget": None, "max_receive_rows": None, "check_exchanges": False, "expert_gemm": "loop",
    }  # fmt: skip
    for name, default in unused.items():
        value = getattr(parallel, name)
        if value not in (default, "auto"):
            problem = f"parallel.{name}={value}: {why}; leave it out"
            yield Violation((f"parallel.{name}", EXPERTS), problem)
