"""Builds a run's objects from the sections of its configuration."""
