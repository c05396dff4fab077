"""Changes with which more families work, and what a refused family is compared with. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """A change with which more families work.

    Attributes:
        text: In the table.
        error: Pattern of the errors that the change mostly ends; it is tried first.
    """

    text: str
    error: str


NEEDS = {
    "fp32": Need("fp32", "dtype|Double|double"),
    "picture": Need("picture", "hangs|gloo|size|Connection"),
    "whole": Need("whole", "load"),
    "plan": Need("plan", "plan"),
    "eval": Need("eval", "differs"),
}
OTHERS = {"": "FSDP2 without expert parallelism", "all_to_all": "transformers' own all_to_all"}
LIMITS = {"fp64": 1e-9, "fp32": 2e-4}  # of differences from one rank
