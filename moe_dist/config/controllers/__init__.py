"""The kinds of controllers, which change the router's selection bias. `kinds.py` has the keys and rules of each kind."""
