"""Prepares data sets, such as the default corpus, and loads packed batches from a position that a checkpoint saves."""
