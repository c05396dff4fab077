"""Groups of parameters for an optimizer, fused optimizers, schedules and the global gradient norm."""
