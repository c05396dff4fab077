"""Whether a model can be asked for one token after the other at all. Imports no torch."""

from moe_dist.config.schema import ModelSection

# Routers whose choice for a token needs no token behind it. A router that chooses tokens (expert choice) belongs here only
# with a causal form of its own, by auxiliary routers or thresholds: then with a condition in `causal_faults`.
CAUSAL_ROUTERS = frozenset({"top_k"})


def causal_faults(model: ModelSection) -> list[str]:
    """Why a model's routing of a token depends on later ones also in evaluation; empty where it does not."""
    kind = model.moe.router.kind
    if kind in CAUSAL_ROUTERS:
        return []
    return [
        f"model.moe.router.kind={kind}: its choice for a token looks at later ones, and the run has no causal router; "
        "train one with it, or generate from a run whose router is one of " + ", ".join(sorted(CAUSAL_ROUTERS))
    ]
