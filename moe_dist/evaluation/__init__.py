"""Held-out losses by modality, and what a finished run is measured against."""
