"""One training step, with this project's own engine or with Megatron's pipeline."""
