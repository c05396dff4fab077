"""Controllers of the routers' selection biases, one rule a file: what steers the load without a gradient."""
