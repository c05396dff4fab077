"""Experiments, comparisons and benchmarks of moe_dist's makers; they import the product, which never imports them."""
