"""Multiple-choice questions from packages: facts, the side that each stands on, and their choices."""
