"""The kinds of controllers, which change the router's selection bias. Each kind of controller has a file with the kind's
keys and rules."""
