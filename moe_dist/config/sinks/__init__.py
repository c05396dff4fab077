"""The kinds of sink, a file each: their keys and their rules."""
