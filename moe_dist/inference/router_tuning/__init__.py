"""Prepares the samples of router tuning: embeds texts, and scores answered questions."""
