"""The kinds of dispatcher, a file each: their keys, what they need, and their rules."""
