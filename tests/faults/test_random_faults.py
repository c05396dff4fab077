"""A run of 60 steps on 4 ranks with 20 random faults of every phase and kind ends bit-equal to an undisturbed run.

MOE_DIST_FAULT_SEED=<seed> repeats the faults of the printed seed. MOE_DIST_FAULT_CAMPAIGNS=<n> runs n campaigns. Every
second campaign has no asynchronous saves.
"""

import os
import random

import pytest

from tests.support.campaign import FAULTS, campaign
from tests.support.site import Site

SEED = int(os.environ.get("MOE_DIST_FAULT_SEED", random.SystemRandom().randrange(1_000_000)))


@pytest.mark.parametrize("number", range(int(os.environ.get("MOE_DIST_FAULT_CAMPAIGNS", "1"))))
def test_a_run_with_twenty_faults_ends_with_the_bits_of_the_undisturbed_one(site: Site, number: int) -> None:
    seed = SEED + number
    print(f"seed {seed}")
    report = campaign(site, seed, asynchronous=number % 2 == 0)
    for fault in report.faults:
        print(fault)
    print(f"{report.starts} starts, {report.seconds:.0f} s")
    assert not report.problems, f"seed {seed}: " + "\n".join(report.problems)
    assert len(report.faults) == FAULTS
