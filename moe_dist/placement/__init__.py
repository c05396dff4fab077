"""Which expert lives on which rank: the map, the policies that make one, and the planner. Imports no torch."""
