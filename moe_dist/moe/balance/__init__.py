"""Bias controllers change the selection biases of routers without a gradient. Each rule of a controller has one file."""
