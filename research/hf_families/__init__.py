"""Runs each mixture-of-experts family of the installed transformers on two ranks, and writes the table of families."""

# Changes with which more families work. If an error matches a change's pattern, this change is tried first.
NEEDS = {
    "fp32": "dtype|fp32|ouble|scalar type",
    "picture": "hangs|gloo|size|Connection",
    "whole": "load",
    "plan": "plan",
    "eval": "differs",
}
OTHERS = {"": "FSDP2 without expert parallelism", "all_to_all": "transformers' own all_to_all"}
LIMITS = {"fp64": 1e-9, "fp32": 2e-4}  # largest allowed differences from one rank
