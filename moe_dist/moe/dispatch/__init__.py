"""Dispatchers send tokens to the ranks of their experts, and sum the experts' outputs. Each dispatch method has a file."""
