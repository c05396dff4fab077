"""Dispatchers send tokens to their experts' ranks and sum the results. Each kind is one file."""
