"""The loss of a step: cross entropy, balance and z terms, distillation."""
