"""Dispatchers: they send tokens to their experts' ranks and sum the results, one file for each kind."""
