"""Checks the rule `split_experts` of `run.init_rules`, by which each expert of a trained mixture becomes m finer experts.

Every router row of the checkpoint becomes m equal rows, next to each other. With m k choices per token, a token takes all m
copies of the k columns that it took before, because on a tie the first columns win. A softmax over m times as many columns
gives each column 1 / m of the probability, and weights divided by their sum become 1 / m of their former values. The
router's `scale` must therefore become m times as large. If the routing weights are the sigmoids themselves, not divided by
their sum, `scale` does not change. Imports no torch.
"""

from collections.abc import Iterator, Mapping

from moe_dist.config.base.section import Violation, WholeConfig
from moe_dist.config.model_schema import GroupSection

ROUTER = "model.moe.router"


def split_experts_violations(config: WholeConfig) -> Iterator[Violation]:
    """Yields the reasons why a split model would not compute the checkpoint's function at step 0, as far as the
    configuration tells."""
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


def parts_of_experts(config: WholeConfig, source: Mapping[str, object]) -> dict[str, int]:
    """Returns m for each group, from the numbers of true experts in `config` and in the checkpoint's configuration
    `source`; 0 if the first number is no multiple of the second."""
    old = _old_groups(source)
    parts = {}
    for name, group in config.model.moe.groups.items():
        before = old.get(name, {}).get("num_experts", 0)
        parts[name] = group.num_experts // before if before and group.num_experts % before == 0 else 0
    return parts


def split_experts_problems(config: WholeConfig, source: Mapping[str, object]) -> list[str]:
    """Returns the reasons why the split model would compute another function than the checkpoint's model; empty if none."""
    old, here = _old_groups(source), config.model.moe
    router = _old_router(source)
    if not old or not router:
        return ["the checkpoint does not say by which router it was trained (model.moe in its state.json)"]
    own = here.router.model_dump(mode="json")
    problems = [
        f"{ROUTER}.{key}={own[key]!r}: the checkpoint has {value!r}; take it"
        for key, value in router.items()
        if key in own and key not in ("scale", "selection_bias", "n_group", "topk_group") and own[key] != value
    ]
    if router.get("topk_group", 1) != router.get("n_group", 1):
        problems.append(
            f"the checkpoint's router takes experts of {router.get('topk_group')} of {router.get('n_group')} node groups, "
            "by their two best scores, which would be those of one expert; split_experts has no place for this"
        )
    if router.get("selection_bias") and not here.router.has_selection_bias:
        problems.append(f"{ROUTER}.selection_bias=False: the checkpoint's router chooses with biases; take true")
    scale = router.get("scale", 1.0)
    for (name, group), parts in zip(here.groups.items(), parts_of_experts(config, source).values(), strict=True):
        if name not in old:
            problems.append(f"model.moe.groups.{name}: the checkpoint has no such group; it has {', '.join(old)}")
            continue
        problems += _group_problems(name, group, old[name], parts)
        growth = here.router.growth_of_scale(parts)
        if parts and growth and isinstance(scale, float) and getattr(here.router, "scale", 1.0) != scale * growth:
            problems.append(
                f"{ROUTER}.scale={getattr(here.router, 'scale', 1.0):g}: {parts} parts of an expert in group {name} have "
                f"the weight of the expert with scale={scale * growth:g}; take it"
            )
    return problems


def _group_problems(name: str, group: GroupSection, old: Mapping[str, int], parts: int) -> list[str]:
    key, before = f"model.moe.groups.{name}", old.get("num_experts", 0)
    if parts < 1:
        return [f"{key}.num_experts={group.num_experts}: must be a multiple of the checkpoint's {before}"]
    wanted = {
        "num_null": parts * old.get("num_null", 0),
        "top_k": parts * old.get("top_k", 0),
        "num_identity": old.get("num_identity", 0),
        "num_constant": old.get("num_constant", 0),
    }
    found = {field: getattr(group, field) for field in wanted}
    return [
        f"{key}.{field}={found[field]}: with {parts} parts of each of {before} experts a token takes what it took only for "
        f"{field}={value}; take it"
        for field, value in wanted.items()
        if found[field] != value
    ]


def _old_router(source: Mapping[str, object]) -> dict[str, object]:
    found = old_moe(source).get("router")
    return dict(found) if isinstance(found, Mapping) else {}


def _old_groups(source: Mapping[str, object]) -> dict[str, dict[str, int]]:
    groups = old_moe(source).get("groups")
    found = groups.items() if isinstance(groups, Mapping) else ()
    return {
        name: {field: value for field, value in old.items() if isinstance(value, int)}
        for name, old in found
        if isinstance(old, Mapping)
    }


def old_moe(source: Mapping[str, object]) -> Mapping[str, object]:
    """Returns `model.moe` of a checkpoint's configuration; empty if it is missing."""
    model = source.get("model")
    moe = model.get("moe") if isinstance(model, Mapping) else None
    return moe if isinstance(moe, Mapping) else {}
