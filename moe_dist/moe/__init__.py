"""The mixture-of-experts layer: routing, dispatch, experts, and a slow reference for tests."""
