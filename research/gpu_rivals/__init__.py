"""Compares the times of moe_dist's MoE layer and training step with those of other implementations on a GPU."""
