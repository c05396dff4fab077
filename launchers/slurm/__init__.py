"""A run on a Slurm cluster: the job script, and one step on the nodes for each attempt."""
