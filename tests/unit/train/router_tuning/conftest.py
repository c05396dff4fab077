"""A folder of samples. Tests must not write to it."""

from pathlib import Path

import pytest

from tests.support.tuning_samples import made_samples


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_samples(
        tmp_path_factory.mktemp("samples") / "made", ids=(0, 192), layers=(0, 1), columns=13, model={}, longest=8
    )
