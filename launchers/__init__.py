"""Commands that start a run: `python -m launchers.local`, `.slurm` or `.ray`. Launchers never import torch."""

from moe_dist.runtime.renamed import name_renamed_modules

name_renamed_modules()
