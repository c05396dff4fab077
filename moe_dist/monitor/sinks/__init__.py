"""Where records go: one file a sink, all behind `sink.Sink`."""
