"""Whether a model can be asked for one token after the other at all. Imports no torch."""

from moe_dist.config.model_schema import ExpertChoiceRouterSection, ModelSection

# Routers whose choice for a token needs no token behind it, and not the place that the token has in a batch.
CAUSAL_ROUTERS = frozenset({"top_k"})


def causal_problems(model: ModelSection) -> list[str]:
    """Why a model's routing of a token depends on later ones also in evaluation; empty where it does not."""
    router = model.moe.router
    if isinstance(router, ExpertChoiceRouterSection):
        if router.causal is not None:
            return []
        return [
            "model.moe.router.causal=null: the choice of experts looks at later tokens, and the run has no causal router; "
            "train one with causal=threshold or causal=auxiliary, and generate from that"
        ]
    if router.kind in CAUSAL_ROUTERS:
        return []
    return [
        f"model.moe.router.kind={router.kind}: its choice hangs on the place in a batch; generate from a run "
        "whose router is one of expert_choice, " + ", ".join(sorted(CAUSAL_ROUTERS))
    ]
