"""The dispatch benchmark: points to measure, contenders (implementations), timing in turns, verdicts and tables."""
