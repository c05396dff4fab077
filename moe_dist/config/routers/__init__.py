"""The kinds of router, a file each: their keys, what they can do, and their rules."""
