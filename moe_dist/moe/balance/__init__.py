"""Controllers of the routers' selection biases, one rule a file: they steer the load without a gradient."""
