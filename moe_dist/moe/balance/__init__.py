"""Bias controllers: they change the selection biases of routers without a gradient. Each rule is one file."""
