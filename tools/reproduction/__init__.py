"""Experiments whose rules are written down before they run: tools/reproduce.py, docs/reproductions.md."""
