"""A run of 60 steps on 4 ranks with 20 random faults of every phase and kind ends with the bits of the undisturbed run.

The seed is printed; MOE_DIST_FAULT_SEED=<seed> draws the same faults. MOE_DIST_FAULT_CAMPAIGNS=<n> breaks n runs, every
second one without asynchronous saves.
"""

import os
import random
from itertools import pairwise

import pytest

from tests.support.campaign import FAULTS, MOST_FROZEN, campaign, draw
from tests.support.fault_plan import KINDS, PHASES
from tests.support.judgement import survives
from tests.support.site import STEPS, Site

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


@pytest.mark.parametrize("seed", range(50))
def test_every_draw_covers_every_phase_and_every_kind(seed: int) -> None:
    faults = draw(random.Random(seed))
    assert len(faults) == FAULTS
    assert {fault.phase for fault in faults} == set(PHASES)
    assert {fault.kind for fault in faults} == set(KINDS)
    assert not any(late.phase == "import" and survives(early) for early, late in pairwise(faults))
    assert [fault.step for fault in faults] == sorted({fault.step for fault in faults})
    assert all(1 < fault.step <= STEPS for fault in faults)
    assert 0 < sum(fault.kind == "SIGSTOP" for fault in faults) <= MOST_FROZEN + 1
    assert draw(random.Random(seed)) == faults
