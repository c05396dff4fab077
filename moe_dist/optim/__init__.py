"""Builds parameter groups, optimizers and learning-rate schedules, and computes the global gradient norm."""
