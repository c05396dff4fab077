"""The experiments of configs/reproduce: run, measured and reported."""
