"""The dispatch benchmark: measured points, contenders (implementations), alternating timing, verdicts and tables."""
