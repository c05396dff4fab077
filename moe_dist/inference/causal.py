"""Whether a model can be asked for one token after the other at all. Imports no torch."""

from moe_dist.config.model_schema import ModelSection


def causal_problems(model: ModelSection) -> list[str]:
    """Why a model's routing of a token depends on other ones also in evaluation; empty where it does not."""
    problem = model.moe.router.not_causal()
    return [problem] if problem else []
