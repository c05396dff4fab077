"""Rules between load controllers, the balance loss and the rest of a configuration. Imports no torch."""

from collections.abc import Iterator

from moe_dist.config.model_schema import MoESection
from moe_dist.config.schema import Config
from moe_dist.config.section import Violation, unknown_name


def balance_violations(config: Config) -> Iterator[Violation]:
    """Violated rules of `model.moe.balance` and `loss.balance`."""
    moe, key = config.model.moe, "model.moe.balance"
    for name in config.loss.balance.null_weight:
        if problem := unknown_name("group", name, moe.groups):
            where = "loss.balance.null_weight"
            yield Violation((where, "model.moe.groups"), f"{where}.{name}: {problem}")
    kinds = [section.kind for section in moe.balance]
    for kind in dict.fromkeys(kinds):
        if kinds.count(kind) > 1:
            problem = (
                f"{key}: {kinds.count(kind)} controllers of kind {kind}; leave one, its target may name several groups"
            )
            yield Violation((key,), problem)
    if moe.balance and not moe.router.has_selection_bias:
        problem = (
            f"{key}: controllers move the bias that the router chooses by, and model.moe.router has none; set "
            "model.moe.router.selection_bias=true (kind top_k or group_limited), or leave out the controllers"
        )
        yield Violation((key, "model.moe.router"), problem)


def active_targets(section: MoESection) -> dict[str, float]:
    """A controller's target in true experts per token, by group."""
    return {name: target for each in section.balance for name, target in each.targets.items()}


def even_active(config: Config) -> dict[str, float]:
    """Expected true experts per token by group: the controller's target, else the number at which a weighted loss is even,
    k n / (n + m w). Groups without either are left out."""
    groups, found = config.model.moe.groups, {}
    for name, weight in config.loss.balance.null_weight.items():
        group = groups[name]
        weighted = group.num_null + (group.num_zero_computation if config.loss.balance.kind == "null_split" else 0)
        rest = group.num_zero_computation if config.loss.balance.kind == "null_averaged" else 0
        found[name] = group.top_k * group.num_experts / (group.num_experts + weighted * weight + rest)
    return found | active_targets(config.model.moe)
