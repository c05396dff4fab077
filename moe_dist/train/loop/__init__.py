"""The loop over steps, and the session around it."""
