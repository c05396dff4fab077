"""A run of 24 steps on 4 ranks with 8 random faults ends bit-equal to an undisturbed run. Exhaustive cases have 60 steps
and 20 faults of every phase and kind.

MOE_DIST_FAULT_SEED=<seed> repeats the faults of the printed seed. MOE_DIST_FAULT_CAMPAIGNS=<n> runs n campaigns of 20
faults. Every second campaign has no asynchronous saves.
"""

import os
import random

import pytest

from tests.support.campaign import ALL_FAULTS, campaign
from tests.support.cover import exhaustive
from tests.support.site import Site

SEED = int(os.environ.get("MOE_DIST_FAULT_SEED", random.SystemRandom().randrange(1_000_000)))
CAMPAIGNS = int(os.environ.get("MOE_DIST_FAULT_CAMPAIGNS", "1"))


@pytest.mark.parametrize(("number", "faults"), [(0, 8), *(exhaustive(number, ALL_FAULTS) for number in range(CAMPAIGNS))])
def test_a_run_with_random_faults_ends_with_the_bits_of_the_undisturbed_one(site: Site, number: int, faults: int) -> None:
    seed = SEED + number
    print(f"seed {seed}")
    report = campaign(site, seed, faults, asynchronous=number % 2 == 0)
    for fault in report.faults:
        print(fault)
    print(f"{report.starts} starts, {report.seconds:.0f} s")
    assert not report.problems, f"seed {seed}: " + "\n".join(report.problems)
    assert len(report.faults) == faults
