"""Parameter groups, fused optimizers, schedules and the global gradient norm."""
