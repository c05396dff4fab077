"""Slow references: loops over tokens that are easy to read, and the routings that tests and benchmarks feed."""
