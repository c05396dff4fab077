"""Makes multiple-choice questions, and divides them into three sides: train, validation and test."""
