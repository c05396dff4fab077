"""The kinds of controllers, which change the router's selection bias. Each kind has a file with its keys and rules."""
