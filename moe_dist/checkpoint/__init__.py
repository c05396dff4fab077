"""Saves and loads the state of a run. Tensors have logical names, which are equal in all layouts of ranks."""
