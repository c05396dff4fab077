"""The kinds of optimizers. Each kind of optimizer has a file with the kind's keys and rules."""
