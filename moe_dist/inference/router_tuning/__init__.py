"""Prepares the samples for router tuning: computes embeddings of texts, and scores answered questions."""
