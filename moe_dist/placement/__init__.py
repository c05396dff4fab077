"""The map of experts to ranks, the roles of parameters, and the routing counts. Imports no torch."""
