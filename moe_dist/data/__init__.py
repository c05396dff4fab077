"""Prepares data sets, such as the default corpus, and loads packed batches. Checkpoints save the position in the data."""
