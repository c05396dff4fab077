"""The kinds of sink, which show or store a run's records. Each kind of sink has a file with the kind's keys and rules."""
