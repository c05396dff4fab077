"""Commands that start a run, `moe-dist launch NAME`. Launchers never import torch."""
