"""Collects facts about this node, and checks them."""
