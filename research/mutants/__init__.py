"""Faults seeded into the product, and which tests see them: proof that CI's tests find what all tests find."""
