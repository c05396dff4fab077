"""Runs, measures and reports the experiments of configs/reproduce."""
