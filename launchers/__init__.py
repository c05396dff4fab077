"""Start a run: on this machine, or on a cluster. Run as `python -m launchers.<where>`. Never imports torch."""

from moe_dist.runtime.renamed import name_renamed_modules

name_renamed_modules()
