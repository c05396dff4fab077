"""Collects facts about the nodes of a run, and finds problems in these facts."""
