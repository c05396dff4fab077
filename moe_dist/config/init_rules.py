"""Rules of `run.init_rules` for a configuration; the checkpoint is checked when it is loaded. No torch."""

from collections.abc import Iterator, Mapping

from moe_dist.config.model_schema import GroupSection
from moe_dist.config.schema import Config
from moe_dist.config.section import Violation


def identity_choices(num_experts: int, num_null: int, true_choices: int) -> range:
    """The values of top_k for which null rows that copy each of n true rows m / n times keep the choice of a
    top-`true_choices`.

    Sorted by logit, true columns first on ties, a token's columns are its best true expert, the m / n copies of that one,
    its second best, and so on in blocks of m / n + 1. So k choices contain the ceil(k / (m / n + 1)) best true experts.
    These are k0 for

        (k0 - 1) (m / n + 1) + 1  <=  k  <=  k0 (m / n + 1)

    which for k0 = 2 is m / n + 2 <= k <= 2 m / n + 2. m must be a multiple of n, and k0 at most n. The rule does not cover
    two true experts with exactly equal logits: at the k0-th place both would be chosen unless k is the least of the range.
    """
    block = num_null // num_experts + 1
    return range((true_choices - 1) * block + 1, true_choices * block + 1)


def init_violations(config: Config) -> Iterator[Violation]:
    """Violated rules of `run.init_rules` that do not depend on the checkpoint."""
    rules, key = config.run.init_rules, "run.init_rules"
    if rules and config.run.init_from is None:
        problem = (
            f"{key}={list(rules)}: there are no weights to make anything of; set run.init_from, or leave the rules out"
        )
        yield Violation((key, "run.init_from"), problem)
    if len(set(rules)) < len(rules):
        yield Violation((key,), f"{key}={list(rules)}: a rule stands there twice; once is enough")
    if "adapt" in rules and len(set(rules)) > 1:
        problem = f"{key}={list(rules)}: under adapters the base stays as it is; leave the other rules out, or adapt"
        yield Violation((key,), problem)
    if "copy_nulls" in rules:
        yield from _copy_violations(config)


def _copy_violations(config: Config) -> Iterator[Violation]:
    moe, key = config.model.moe, "run.init_rules"
    name, fix = f"{key}: copy_nulls", "or leave copy_nulls out: null rows then begin as new ones"
    if not moe.router.softmax_top_k:
        problem = f"{name}: {no_identity(moe.router.kind)}; take model.moe.router.kind=top_k, {fix}"
        yield Violation((key, "model.moe.router.kind"), problem)
        return
    if moe.router.single_null_row:
        problem = (
            f"{name}: model.moe.router.null_logit=single has one null row, which cannot copy several; take each, {fix}"
        )
        yield Violation((key, "model.moe.router.null_logit"), problem)
    if not any(group.num_null for group in moe.groups.values()):
        yield Violation((key, "model.moe.groups"), f"{name}: no group has null experts; give one num_null")
    for group_name, group in moe.groups.items():
        if group.num_null % group.num_experts:
            near = -(-group.num_null // group.num_experts) * group.num_experts
            problem = (
                f"{name}: model.moe.groups.{group_name}.num_null={group.num_null} is no multiple of num_experts="
                f"{group.num_experts}, so that some true rows would have more copies than others; take {near}, {fix}"
            )
            yield Violation((key, f"model.moe.groups.{group_name}"), problem)
        if group.num_identity or group.num_constant:
            problem = (
                f"{name}: model.moe.groups.{group_name} has num_identity={group.num_identity} and num_constant="
                f"{group.num_constant} zero-computation experts, which would be chosen before some copies; set both "
                f"to 0, {fix}"
            )
            yield Violation((key, f"model.moe.groups.{group_name}"), problem)


def no_identity(kind: object) -> str:
    """Why a router of another kind than top_k does not start unchanged with copied null rows."""
    return (
        f"with a router of kind {kind} copies of true rows do not leave the choice as it was: that follows from a plain "
        "top-k of one softmax, where a twin stands right behind its original; scores that are sigmoids, and choices "
        "limited to groups of experts or made by the experts, weigh or count a twin otherwise"
    )


def source_problems(config: Config, source: Mapping[str, object]) -> list[str]:
    """Why a trained top-k model, given by `source` (the configuration in its checkpoint), would not start unchanged with
    the null rows of `config` copied from its true rows; empty if it would.

    Bit equality concerns the forward pass; a capacity and the auxiliary terms act only in training.
    """
    here = config.model.moe
    model = source.get("model")
    moe = model.get("moe") if isinstance(model, Mapping) else None
    router, groups = (moe.get("router"), moe.get("groups")) if isinstance(moe, Mapping) else (None, None)
    if not isinstance(router, Mapping) or not isinstance(groups, Mapping):
        return ["the checkpoint does not say by which router it was trained (model.moe in its state.json)"]
    if not here.router.softmax_top_k or router.get("kind") != here.router.kind:
        return [no_identity(router.get("kind") if here.router.softmax_top_k else here.router.kind)]
    problems, own = [], here.router.model_dump()
    if router.get("selection_bias"):
        problems.append(
            "the checkpoint's router chooses by softmax + bias: with m / n copies of each row every probability is 1 / "
            "(1 + m / n) of what it was and the bias is not, so that the choice would be another; leave copy_nulls out"
        )
    wanted = "true_all" if router.get("normalise") in ("none", "true_all") else "true_chosen"
    if own["normalise"] != wanted:
        problems.append(
            f"model.moe.router.normalise={own['normalise']}: the checkpoint's {router.get('normalise')} gives its "
            f"weights from true experts alone, since it has no null ones; take {wanted}"
        )
    if router.get("scale", 1.0) != own["scale"]:
        problems.append(f"model.moe.router.scale={own['scale']:g}: the checkpoint's is {router.get('scale')}; take that")
    for name, group in here.groups.items():
        old = groups.get(name)
        if not isinstance(old, Mapping):
            problems.append(
                f"model.moe.groups.{name}: the checkpoint has no such group; it has {', '.join(map(str, groups))}"
            )
            continue
        problems += _group_problems(name, group, old)
    return problems


def _group_problems(name: str, group: GroupSection, old: Mapping[str, object]) -> list[str]:
    key = f"model.moe.groups.{name}"
    before = {field: value for field, value in old.items() if isinstance(value, int)}
    if before.get("num_null") or before.get("num_identity") or before.get("num_constant"):
        return [
            f"{key}: the checkpoint's group has null or zero-computation experts already; its null rows are taken as they "
            "are where num_null agrees, without copy_nulls"
        ]
    if before.get("num_experts") != group.num_experts:
        return [f"{key}.num_experts={group.num_experts}: the checkpoint has {before.get('num_experts')}; take as many"]
    fitting = identity_choices(group.num_experts, group.num_null, before.get("top_k", 0))
    if group.top_k in fitting:
        return []
    least, most = fitting[0], fitting[-1]
    return [
        f"{key}.top_k={group.top_k}: with num_null={group.num_null} copies of {group.num_experts} true rows, a "
        f"token takes the checkpoint's {before.get('top_k')} true experts only for top_k from {least} to {most}; take one "
        "of these, or another num_null"
    ]
