"""Levers (methods) that balance the ranks' loads: move experts, give experts replicas, deal sequences to ranks."""
