"""Makes multiple-choice questions and splits them into sides (train, validation and test)."""
