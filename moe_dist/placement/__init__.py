"""The map of experts to ranks, the roles of parameters, and the routing counts. It imports no torch."""
