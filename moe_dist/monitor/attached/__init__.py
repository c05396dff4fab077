"""Records the routing of a model that another trainer trains."""
