"""Use of a trained run: load it, generate, answer questions, and prepare samples for router tuning."""
