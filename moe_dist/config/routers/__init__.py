"""The kinds of router. Each kind of router has a file with the kind's keys, capabilities and rules."""
