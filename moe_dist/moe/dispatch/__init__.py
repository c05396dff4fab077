"""Dispatchers send tokens to their experts' ranks and sum the experts' outputs. Each dispatch method is one file."""
