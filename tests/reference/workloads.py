"""Makes hidden rows and router weights with which a real router makes the choices of a benchmark workload (W0 to W7).

Shape letters: T tokens, E experts, K choices per token, D hidden size.
"""

import numpy as np

from tools.gpu_check.token_imbalance import WorkloadStep


def hidden_states(step: WorkloadStep, *, num_experts: int, hidden_dim: int, seed: int) -> np.ndarray:
    """Returns hidden rows [T, D], float64, for which a router with weight `router_weight` makes the step's choices.

    The first E numbers of a row are its logits. Chosen experts have different logits of at least 3, and all other
    experts have logits of at most 1. With this margin of 2 a few small optimizer steps do not change the choices. The
    other numbers are noise.

    Raises:
        ValueError: D is smaller than E.
    """
    if hidden_dim < num_experts:
        raise ValueError(f"hidden_dim={hidden_dim}: the first num_experts={num_experts} of a row are its logits; raise it")
    rng = np.random.default_rng([seed, len(step.expert_TK)])
    h_TD = rng.uniform(-1.0, 1.0, (len(step.expert_TK), hidden_dim))
    high_TK = (
        3.0 + np.argsort(rng.random(step.expert_TK.shape), axis=1) * 0.25 + rng.uniform(0.0, 0.1, step.expert_TK.shape)
    )
    np.put_along_axis(h_TD, step.expert_TK, high_TK, axis=1)
    return h_TD


def router_weight(num_experts: int, hidden_dim: int) -> np.ndarray:
    """Returns router rows [E, D] that read the logits from `hidden_states`."""
    return np.eye(num_experts, hidden_dim)
