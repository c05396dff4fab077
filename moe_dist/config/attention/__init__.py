"""The kinds of attention, one file each: keys, rules, and costs of the projections."""
