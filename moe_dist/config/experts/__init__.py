"""The kinds of expert. Each kind of experts has a file with the kind's keys, properties and rules."""
