"""The kinds of dispatcher. Each kind of dispatcher has a file with the kind's keys, requirements and rules."""
