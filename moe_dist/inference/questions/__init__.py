"""Multiple-choice questions, made and split."""
