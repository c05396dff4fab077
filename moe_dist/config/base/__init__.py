"""The base class of all sections, and the unions of kinds."""
