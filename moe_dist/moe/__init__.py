"""The mixture-of-experts layer: routing, dispatch, experts, and the slow reference they are held to."""
