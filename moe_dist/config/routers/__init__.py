"""The kinds of router, one file each: keys, capabilities and rules."""
