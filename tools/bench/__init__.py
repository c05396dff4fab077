"""The dispatch benchmark: measured points, contenders (implementations), timing in turns, verdicts and tables."""
