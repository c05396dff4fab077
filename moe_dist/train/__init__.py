"""Training: builds objects from configuration sections, takes steps, evaluates and saves."""
