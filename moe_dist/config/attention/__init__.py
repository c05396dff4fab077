"""The kinds of attention, one file each: keys, rules, and what the projections cost."""
