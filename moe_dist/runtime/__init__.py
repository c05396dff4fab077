"""The environment of one process of a run: rank, signals, log, watchdog and run folder."""
