"""Runs each mixture-of-experts family of the installed transformers on two ranks, and writes the table of families."""
