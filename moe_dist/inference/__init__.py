"""A trained run in use: loaded, it generates, answers questions, and prepares the samples of router tuning."""
