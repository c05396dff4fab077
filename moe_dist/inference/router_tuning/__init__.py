"""Prepares the samples of router tuning: embeddings, and questions scored for success."""
