"""Destinations of records: one file for each kind, all with the interface `sink.Sink`."""
