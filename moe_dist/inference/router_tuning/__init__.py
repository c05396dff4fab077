"""Which layers and samples a run's router tuning learns from."""
