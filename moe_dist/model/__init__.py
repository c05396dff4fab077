"""The transformer, written for one device: no collectives."""
