"""Creates process groups, and makes a single-device model parallel: initial weights, sharding, gradient sums."""
