"""Launches a run on a Ray cluster: a driver starts one actor for each rank."""
