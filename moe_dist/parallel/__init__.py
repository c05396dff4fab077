"""The device mesh, and the steps that make a single-device model parallel."""
