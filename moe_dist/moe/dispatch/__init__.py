"""Dispatchers send tokens to their experts' ranks and sum the experts' outputs. Each kind of dispatcher is one file."""
