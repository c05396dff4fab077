"""Checks that a model can generate: its routing must not depend on later tokens. Imports no torch."""

from moe_dist.config.model_schema import ModelSection


def causal_problems(model: ModelSection) -> list[str]:
    """Reasons why the routing of a token depends on other tokens in evaluation; empty if it does not."""
    problem = model.moe.router.not_causal()
    return [problem] if problem else []
