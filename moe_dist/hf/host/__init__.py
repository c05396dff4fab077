"""Mixture-of-experts models of transformers inside this project's engine (engine.kind=transformers)."""
