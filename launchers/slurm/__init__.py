"""Launches a run on a Slurm cluster: writes the job script, and starts one srun step on the nodes for each attempt."""
