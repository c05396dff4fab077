"""The training: sections become objects, a loop takes steps, evaluates and saves."""
