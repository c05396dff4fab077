"""Checks of the nodes of a run: collects facts on each node and finds problems in them."""
