"""One process of a run: rank, signals, log, watchdog and run folder."""
