"""One record a step, and where it goes."""
