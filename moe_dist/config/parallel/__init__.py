"""Defines the sections that lay out a run over its ranks."""
