"""If a FIFO or a device stands in place of a data file, the error names it, and no read blocks or runs forever."""

import shutil
from pathlib import Path

import pytest

from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import load_manifest
from moe_dist.plan.preflight import check
from moe_dist.train.build.training import build_loader
from tests.support.special_files import SPECIAL, reads_little
from tests.support.tiny import tiny_config

FILES = ["manifest.json", "captions_train.bin", "prose_valid.idx", "captions_train.filler"]


def test_a_manifest_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as stream:
        stream.truncate(5 << 30)  # a sparse file, without blocks on the disk
    with reads_little(), pytest.raises(DataError, match="is larger than"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("name", FILES)
def test_a_special_file_is_refused_by_name_within_a_second(tiny_data: Path, tmp_path: Path, name: str, kind: str) -> None:
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / name).unlink()
    SPECIAL[kind](data / name)
    config = tiny_config(data, tmp_path / "runs")
    with reads_little(), pytest.raises((ConfigError, DataError), match=name):
        build_loader(config, check(config).manifest, rank=0, world_size=1).batches(0)
