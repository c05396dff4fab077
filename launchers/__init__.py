"""Commands that start a run: `python -m launchers.local`, `.slurm` or `.ray`. Launchers never import torch."""
