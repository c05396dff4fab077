"""The kinds of expert, one file each: keys, properties and rules."""
