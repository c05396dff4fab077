"""Defines the kinds of attention. Each kind has a file with its keys, its rules and the costs of its projections."""
