"""Load controllers: they change the routers' selection biases without a gradient; one rule in each file."""
