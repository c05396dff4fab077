"""The kinds of sink, one file each: keys and rules."""
