"""Saves and loads the state of a run. A tensor's logical name does not depend on the layout of ranks."""
