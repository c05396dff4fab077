"""Routers that serve only as controls of experiments. They are kinds of the package moe-dist-research."""
