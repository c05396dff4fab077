"""The dispatch benchmark: points and contenders, interleaved timing on several ranks, judgement and tables."""
