"""Checks of a place to run before a job runs there: scheduler, nodes, and the network between them."""
