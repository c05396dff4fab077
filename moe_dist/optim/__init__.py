"""Parameter groups for an optimizer, fused optimizers, schedules and the global gradient norm."""
