"""Commands for data, trained runs, checkpoints and measurements: `python -m tools.<name>` in a clone, or `moe-dist`."""
