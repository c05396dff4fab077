"""Creates process groups, and parallelises a single-device model: initial weights, sharding and sums of gradients."""
