"""Levers against uneven load of ranks: experts move or get replicas, sequences are dealt."""
