"""Makes the report of a run's routing: one HTML file without scripts (docs/monitoring.md)."""
