"""Defines the base class of all sections, and makes the unions of kinds."""
