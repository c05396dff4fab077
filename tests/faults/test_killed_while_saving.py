"""SIGKILL ends all ranks at random moments of a save. The checkpoint that `latest` names always loads and verifies."""

import os
import random

import pytest

from tests.support.campaign import killed_while_saving
from tests.support.cover import exhaustive
from tests.support.site import Site


@pytest.mark.parametrize("kills", [5, exhaustive(10)])
def test_latest_verifies_after_each_kill(site: Site, kills: int) -> None:
    seed = int(os.environ.get("MOE_DIST_FAULT_SEED", random.SystemRandom().randrange(1_000_000)))
    print(f"seed {seed}")
    report = killed_while_saving(site, seed, kills)
    print(report.faults, f"{report.seconds:.0f} s")
    assert not report.problems, f"seed {seed}: " + "\n".join(report.problems)
