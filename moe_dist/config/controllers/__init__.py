"""The kinds of controllers of the router's selection bias, one file each: keys and rules."""
