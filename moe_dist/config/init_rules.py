"""Checks `run.init_rules`, which lists the changes to loaded weights. `source_problems` needs the checkpoint's
configuration, so it is called only when the checkpoint is loaded. Imports no torch."""

from collections.abc import Iterator

from moe_dist.config.base.section import Violation, WholeConfig
from moe_dist.config.model_schema import GroupSection, ModelSection

KEY = "run.init_rules"
ROUTER = "model.moe.router"
UNKNOWN_ROUTER = "the checkpoint does not say by which router it was trained (model.moe in its state.json)"


def _split_violations(config: WholeConfig) -> Iterator[Violation]:
    """Yields the reasons, as far as the configuration shows them, why a split model would not compute the dense model's
    function at step 0.

    At step 0 the model computes the function of the dense model if each token takes all n experts of its group with the
    weight 1. Every router row is therefore initialised to 0. All router columns then have the same score, and ties are
    resolved in favour of true experts. The weight of each of the `top_k` choices is scale / N, where N follows from the
    router, so `scale` must be N. If N is a power of two, 1 / N and scale / N are exact in any floating-point format, and
    the weights are exactly 1.
    """
    router, rule = config.model.moe.router, "run.init_rules: split"
    for name, group in config.model.moe.groups.items():
        key = f"model.moe.groups.{name}"
        if group.top_k < group.num_experts:
            problem = (
                f"{rule}: {key}.top_k={group.top_k} must be at least num_experts={group.num_experts}, so that a token "
                "starts with all parts of the FFN; raise it, give the group as many null experts (num_null), and lower the "
                "load with a controller (model.moe.balance: active_experts)"
            )
            yield Violation(("run.init_rules", f"{key}.top_k", f"{key}.num_experts"), problem)
            continue
        if group.num_zero_computation:
            problem = f"{rule}: {key} has identity or constant experts, which the FFN lacks; set their numbers to 0"
            yield Violation(("run.init_rules", key), problem)
        parts = router.equal_share(group)
        if parts is None:
            problem = (
                f"{rule}: with {ROUTER}.{router.said} a token would not start with all parts of the FFN; take kind=top_k, "
                "or kind=group_limited with n_group=topk_group"
            )
            yield Violation(("run.init_rules", ROUTER), problem)
        elif parts & (parts - 1):
            problem = (
                f"{rule}: {key}: with {ROUTER}.normalise={getattr(router, 'normalise', None)} the weights start at scale / "
                f"{parts}, and {parts} is no power of two, so that they would be rounded; change num_experts, num_null or "
                "top_k, or normalise"
            )
            yield Violation(("run.init_rules", key, f"{ROUTER}.normalise"), problem)
        elif getattr(router, "scale", 1.0) != parts:
            problem = (
                f"{rule}: {ROUTER}.scale={getattr(router, 'scale', 1.0):g}: the weights of group {name} start at scale / "
                f"{parts} and must be 1; take scale={parts}"
            )
            yield Violation(("run.init_rules", f"{ROUTER}.scale", key), problem)


def identity_choices(num_experts: int, num_null: int, true_choices: int) -> range:
    """Returns the values of top_k with which a token takes the same `true_choices` true experts before and after the
    router's m null rows become copies of its n true rows (m / n copies of each row).

    Sort a token's columns by logit, with true columns first among equal logits. The token's best true expert comes first,
    then the m / n copies of that expert's row. The second best expert follows with its copies, and so on in blocks of m / n
    + 1 columns. The k best columns contain the ceil(k / (m / n + 1)) best true experts. With k0 = `true_choices`, a token
    takes its k0 best true experts if

        (k0 - 1) (m / n + 1) + 1  <=  k  <=  k0 (m / n + 1)

    For k0 = 2, the condition is m / n + 2 <= k <= 2 m / n + 2. m must be a multiple of n, and k0 must be at most n. The
    range assumes that a token's k0-th and (k0 + 1)-th best true experts have different logits. If these two logits are
    exactly equal, the token takes both experts unless k is the smallest value of the range.
    """
    block = num_null // num_experts + 1
    return range((true_choices - 1) * block + 1, true_choices * block + 1)


def init_violations(config: WholeConfig) -> Iterator[Violation]:
    """Yields a violation for each fault of `run.init_rules` that can be found without the checkpoint."""
    rules = config.run.init_rules
    if rules and config.run.init_from is None:
        problem = f"{KEY}={list(rules)}: there are no weights to change; set run.init_from, or remove the rules"
        yield Violation((KEY, "run.init_from"), problem)
    if len(set(rules)) < len(rules):
        yield Violation((KEY,), f"{KEY}={list(rules)}: lists a rule twice; name each rule once")
    if "adapt" in rules and len(set(rules)) > 1:
        problem = f"{KEY}={list(rules)}: under adapters the base stays unchanged; remove the other rules, or adapt"
        yield Violation((KEY,), problem)
    if "split" in rules and len(set(rules)) > 1:
        problem = f"{KEY}={list(rules)}: split sets all router rows to 0 and takes whole FFNs; remove the other rules"
        yield Violation((KEY,), problem)
    elif "split" in rules:
        experts = config.model.moe.experts
        if experts.num_biases(1, 1):
            problem = (
                f"{KEY}: split: experts of kind={experts.kind} have a bias of their output, which each part would add; "
                "take model.moe.experts.kind=ffn, or remove the rule"
            )
            yield Violation((KEY, "model.moe.experts.kind"), problem)
        yield from _split_violations(config)
    if "copy_nulls" in rules:
        yield from _copy_violations(config)


def _copy_violations(config: WholeConfig) -> Iterator[Violation]:
    moe = config.model.moe
    name, fix = f"{KEY}: copy_nulls", "or remove copy_nulls: null rows are then initialised at random"
    if not moe.router.softmax_top_k:
        problem = f"{name}: {_no_identity(moe.router.kind)}; take model.moe.router.kind=top_k, {fix}"
        yield Violation((KEY, "model.moe.router.kind"), problem)
        return
    if moe.router.single_null_row:
        problem = (
            f"{name}: model.moe.router.null_logit=single has one null row, which cannot copy several; take each, {fix}"
        )
        yield Violation((KEY, "model.moe.router.null_logit"), problem)
    if not any(group.num_null for group in moe.groups.values()):
        yield Violation((KEY, "model.moe.groups"), f"{name}: no group has null experts; set num_null of a group")
    for group_name, group in moe.groups.items():
        key = f"model.moe.groups.{group_name}"
        if group.num_null % group.num_experts:
            near = -(-group.num_null // group.num_experts) * group.num_experts
            problem = (
                f"{name}: {key}.num_null={group.num_null} is no multiple of num_experts={group.num_experts}, so that some "
                f"true rows would have more copies than others; take {near}, {fix}"
            )
            yield Violation((KEY, key), problem)
        if group.num_identity or group.num_constant:
            problem = (
                f"{name}: {key} has num_identity={group.num_identity} and num_constant={group.num_constant} "
                f"zero-computation experts, which would be chosen before some copies; set both to 0, {fix}"
            )
            yield Violation((KEY, key), problem)


def _no_identity(kind: object) -> str:
    """Returns why a router of this `kind`, which is not top_k, chooses other experts after null rows copy true rows."""
    return (
        f"with a router of kind {kind} copies of true rows change the choice: only in a plain top-k of one softmax does a "
        "copy rank directly behind its original; sigmoid scores, node groups and experts that choose treat a copy "
        "differently"
    )


def source_problems(config: WholeConfig, source: ModelSection | None) -> list[str]:
    """Returns the reasons why the model of `config`, in which null rows copy the checkpoint's true rows, would have other
    outputs than the checkpoint's model. The list is empty if the outputs are equal. `source` is the section `model` of the
    checkpoint's configuration; None if the checkpoint has none.

    Only outputs in evaluation must be equal. Capacity and auxiliary losses act only in training, so they are not compared.
    """
    if source is None:
        return [UNKNOWN_ROUTER]
    here, router, own = config.model.moe, source.moe.router, config.model.moe.router
    if not own.softmax_top_k or router.kind != own.kind:
        return [_no_identity(router.kind if own.softmax_top_k else own.kind)]
    problems: list[str] = []
    if router.has_selection_bias:
        problems.append(
            "the checkpoint's router chooses by softmax + bias: m / n copies of each row divide every probability by 1 + m "
            "/ n but not the bias, which changes the choice; remove copy_nulls"
        )
    if router.has_logit_bias:
        problems.append("the checkpoint's router has biased logits, and null experts have none; remove copy_nulls")
    before, normalise = (getattr(each, "normalise", "none") for each in (router, own))
    wanted = "true_all" if before in ("none", "true_all") else "true_chosen"
    if normalise != wanted:
        problems.append(
            f"model.moe.router.normalise={normalise}: the weights of the checkpoint's {before} come from true experts "
            f"only, because it has no null experts; take {wanted}"
        )
    old_scale, scale = (getattr(each, "scale", 1.0) for each in (router, own))
    if old_scale != scale:
        problems.append(f"model.moe.router.scale={scale:g}: the checkpoint has scale={old_scale}; take it")
    for name, group in here.groups.items():
        if name in source.moe.groups:
            problems += _group_problems(f"model.moe.groups.{name}", group, source.moe.groups[name])
        else:
            problems.append(
                f"model.moe.groups.{name}: the checkpoint has no such group; it has {', '.join(source.moe.groups)}"
            )
    return problems


def _group_problems(key: str, group: GroupSection, old: GroupSection) -> list[str]:
    if old.num_null or old.num_zero_computation:
        return [
            f"{key}: the checkpoint's group has null or zero-computation experts already; without copy_nulls their rows "
            "are loaded unchanged if num_null is the same"
        ]
    if old.num_experts != group.num_experts:
        return [f"{key}.num_experts={group.num_experts}: the checkpoint has {old.num_experts}; take as many"]
    fitting = identity_choices(group.num_experts, group.num_null, old.top_k)
    if group.top_k in fitting:
        return []
    return [
        f"{key}.top_k={group.top_k}: with num_null={group.num_null} copies of {group.num_experts} true rows, a token takes "
        f"the checkpoint's {old.top_k} true experts only for top_k from {fitting[0]} to {fitting[-1]}; take one of these, "
        "or another num_null"
    ]
