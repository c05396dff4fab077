"""Checks the rule `split` of `run.init_rules`, by which the experts of a group are the parts of one dense FFN.

At step 0 the model computes the function of the dense model if a token takes all n experts of its group, each with the
weight 1. Every router row is therefore initialised to 0. All router columns then have the same score, true experts precede
all others on ties, and the weights of `top_k` choices are scale / N for a number N that follows from the router. `scale`
must be N. If N is a power of two, 1 / N and scale / N are exact in any floating-point format, so that the weights are
exactly 1. Imports no torch."""

from collections.abc import Iterator

from moe_dist.config.base.section import Violation, WholeConfig

ROUTER = "model.moe.router"


def split_violations(config: WholeConfig) -> Iterator[Violation]:
    """Yields the reasons why a split model would not compute the dense model's function at step 0, as far as the
    configuration tells."""
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
