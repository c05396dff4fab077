"""A run on a Ray cluster: the driver, and one actor for each rank."""
