"""Uses a trained run: loads its model, generates, answers questions, and prepares samples for router tuning."""
