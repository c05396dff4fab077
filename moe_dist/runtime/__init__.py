"""The process itself: its rank, its signals, its log and its run folder."""
