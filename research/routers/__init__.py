"""Routers that are used only as controls in experiments. They are kinds of the package moe-dist-research."""
