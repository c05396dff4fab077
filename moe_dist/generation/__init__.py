"""Sampling from a trained model: text that goes on, pictures from captions, captions from pictures."""
