"""Commands for data, trained runs, checkpoints and measurements: `python -m tools.<name>` in a clone, or `moe-dist`."""

from moe_dist.runtime.renamed import name_renamed_modules

name_renamed_modules()
