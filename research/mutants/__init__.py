"""Seeds faults into the product and finds the tests that detect them, to show that CI's tests detect what all tests
detect."""
