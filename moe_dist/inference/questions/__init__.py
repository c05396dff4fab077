"""Makes multiple-choice questions, and splits them into three sides: train, validation and test."""
