"""Checks a machine or cluster before a job runs there: scheduler, nodes, and the network between the nodes."""
