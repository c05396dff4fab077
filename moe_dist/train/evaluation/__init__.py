"""Held-out losses and checks between training steps."""
