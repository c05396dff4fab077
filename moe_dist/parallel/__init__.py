"""The mesh, and the one ordered function that makes a model parallel."""
