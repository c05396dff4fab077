"""Faults that may pass, as the rank that has one sees it: every launcher restarts the run after each of them."""

from moe_dist.runtime.rendezvous import StartError

FAULTS: dict[str, Exception] = {
    "a lost GPU": RuntimeError("CUDA error: uncorrectable ECC error encountered"),  # torch's own is a RuntimeError, too
    "a collective that timed out": RuntimeError("[Rank 1] Watchdog caught collective operation timeout"),
    "a late start": StartError("rank 0 waited 1800 s for rank 1"),
}
RESTARTS = 3  # the limit in these tests
