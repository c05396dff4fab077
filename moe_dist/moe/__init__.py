"""The mixture-of-experts layer: routing, dispatch, experts, losses and bias controllers."""
