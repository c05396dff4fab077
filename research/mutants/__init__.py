"""Seeds faults into the product and finds the tests that detect them, to show that CI's tests detect every fault that any
test detects."""
