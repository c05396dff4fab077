"""The dispatch benchmark: points, contenders, interleaved timing on several ranks, verdicts and tables."""
