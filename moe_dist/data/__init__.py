"""Data sets on disk, packing, the loader with a saved position, and the default corpus."""
