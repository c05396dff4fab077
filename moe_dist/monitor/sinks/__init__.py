"""Defines destinations of records (sinks). All have the interface `sink.Sink`."""
