"""Makes one record for each step and shows it through sinks."""
