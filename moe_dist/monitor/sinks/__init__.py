"""Destinations of records, all with the interface `sink.Sink`."""
