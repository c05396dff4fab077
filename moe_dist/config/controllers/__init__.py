"""The kinds of controllers of the router's selection bias, a file each: their keys and their rules."""
