"""Works with a trained run: loads its model, generates text, answers questions, and prepares samples for router tuning."""
