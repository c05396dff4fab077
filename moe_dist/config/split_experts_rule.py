"""Checks the rule `split_experts` of `run.init_rules`, which divides each expert of a trained mixture into m finer experts.

Every router row of the checkpoint is replaced by m equal rows. With m k choices, a token takes all m copies of the k
columns that it took before. This holds because copies have equal scores and adjacent columns, and of equal scores the first
columns are chosen. In a softmax over m times as many columns, each column has 1 / m of its former probability. Weights that
are divided by their sum become 1 / m of their former values, too. The router's `scale` must therefore become m times as
large. If the routing weights are sigmoids that are not divided by their sum, `scale` does not change. Imports no torch.
"""

from collections.abc import Iterator

from moe_dist.config.base.section import Violation, WholeConfig
from moe_dist.config.model_schema import GroupSection, ModelSection

ROUTER = "model.moe.router"
UNKNOWN_ROUTER = "the checkpoint does not say by which router it was trained (model.moe in its state.json)"


def split_experts_violations(config: WholeConfig) -> Iterator[Violation]:
    """Yields the reasons why a split model would not compute the checkpoint's function at step 0, as far as the
    configuration shows them."""
    router, rule = config.model.moe.router, "run.init_rules: split_experts"
    if router.growth_of_scale(1) is None:
        problem = (
            f"{rule}: with {ROUTER}.{router.said} equal router rows change the choice; take kind=top_k, or "
            "kind=group_limited with n_group=topk_group"
        )
        yield Violation(("run.init_rules", ROUTER), problem)
    for name, group in config.model.moe.groups.items():
        if group.num_zero_computation:
            key = f"model.moe.groups.{name}"
            problem = (
                f"{rule}: {key} has identity or constant experts, which cannot be cut into parts; set their numbers to 0, "
                "or remove the rule"
            )
            yield Violation(("run.init_rules", key), problem)


def split_experts_problems(config: WholeConfig, source: ModelSection | None) -> list[str]:
    """Returns the reasons why the split model would compute another function than the checkpoint's model. `source` is the
    section `model` of the checkpoint's configuration; None if the checkpoint has none."""
    if source is None:
        return [UNKNOWN_ROUTER]
    old, here, own = source.moe, config.model.moe, config.model.moe.router.model_dump(mode="json")
    problems = [
        f"{ROUTER}.{key}={own[key]!r}: the checkpoint has {value!r}; take it"
        for key, value in old.router.model_dump(mode="json").items()
        if key in own and key not in ("scale", "selection_bias", "n_group", "topk_group") and own[key] != value
    ]
    n_group, topk_group = old.router.node_limit
    if topk_group != n_group:
        problems.append(
            f"the checkpoint's router takes experts of {topk_group} of {n_group} node groups, by their two best scores, "
            "which would be those of one expert; split_experts has no place for this"
        )
    if old.router.has_selection_bias and not here.router.has_selection_bias:
        problems.append(f"{ROUTER}.selection_bias=False: the checkpoint's router chooses with biases; take true")
    old_scale, scale = (getattr(each, "scale", 1.0) for each in (old.router, here.router))
    for name, group in here.groups.items():
        key = f"model.moe.groups.{name}"
        if (before := old.groups.get(name)) is None:
            problems.append(f"{key}: the checkpoint has no such group; it has {', '.join(old.groups)}")
        elif group.num_experts % before.num_experts:
            problems.append(
                f"{key}.num_experts={group.num_experts}: must be a multiple of the checkpoint's {before.num_experts}"
            )
        else:
            parts = group.num_experts // before.num_experts
            problems += _group_problems(key, group, before, parts)
            growth = here.router.growth_of_scale(parts)
            if growth and scale != old_scale * growth:
                problems.append(
                    f"{ROUTER}.scale={scale:g}: {parts} parts of an expert in group {name} have the weight of the expert "
                    f"with scale={old_scale * growth:g}; take it"
                )
    return problems


def _group_problems(key: str, group: GroupSection, old: GroupSection, parts: int) -> list[str]:
    wanted = {
        "num_null": parts * old.num_null,
        "top_k": parts * old.top_k,
        "num_identity": old.num_identity,
        "num_constant": old.num_constant,
    }
    return [
        f"{key}.{field}={found}: with {parts} parts of each of {old.num_experts} experts a token takes what it took only "
        f"for {field}={value}; take it"
        for field, value in wanted.items()
        if (found := getattr(group, field)) != value
    ]
