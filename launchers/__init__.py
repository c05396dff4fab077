"""Start a run: on this machine, or on a cluster. Run as `python -m launchers.<where>`. Never imports torch."""
