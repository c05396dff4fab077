"""The kinds of expert, a file each: their keys, what they are, and their rules."""
