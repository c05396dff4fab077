"""The kinds of scaling of rotary frequencies, one file each: keys and rules."""
