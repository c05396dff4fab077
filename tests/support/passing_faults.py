"""Faults that may pass, as errors of the rank that has one. Every launcher restarts the run after each of them."""

from moe_dist.runtime.rendezvous import StartError

FAULTS: dict[str, Exception] = {
    "a lost GPU": RuntimeError("CUDA error: uncorrectable ECC error encountered"),  # torch's error is also a RuntimeError
    "a collective that timed out": RuntimeError("[Rank 1] Watchdog caught collective operation timeout"),
    "a late start": StartError("rank 0 waited 1800 s for rank 1"),
}
RESTARTS = 3  # limit of restarts in these tests
