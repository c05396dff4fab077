"""Levers (methods) that balance the ranks' loads: move experts, deal sequences to ranks."""
