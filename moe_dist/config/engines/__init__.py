"""The kinds of engine. Each kind of engine has a file with the kind's keys, requirements and rules."""
