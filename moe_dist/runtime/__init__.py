"""Manages the environment of each process of a run: rank, signals, log, watchdog and run folder."""
