"""Whether a run can run where it is to: what the login node, the scheduler, each node and the network between them say."""
