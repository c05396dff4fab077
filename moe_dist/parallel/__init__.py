"""Process groups, and what makes a single-device model parallel: initial weights, sharding, gradient sums."""
