"""Seeds faults into the product, and finds the tests that detect them. This shows whether CI's tests detect every fault
that any test detects."""
