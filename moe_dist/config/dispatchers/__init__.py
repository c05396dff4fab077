"""The kinds of dispatcher, one file each: keys, requirements and rules."""
