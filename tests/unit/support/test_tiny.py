"""The tiny data set agrees with its manifest, and the tiny configuration fits it."""

from pathlib import Path

import numpy as np

from moe_dist.formats.index_header import read_index_header
from moe_dist.formats.manifest import load_manifest
from tests.support.tiny import FILLER_CODE, tiny_config, tiny_dataset, write_config


def test_dataset_is_what_its_manifest_says(tmp_path: Path) -> None:
    tiny_dataset(tmp_path, seed=1)
    manifest = load_manifest(tmp_path)
    for source in manifest.sources.values():
        for split in (source.train, source.valid):
            assert split is not None
            assert split.filler is not None
            header = read_index_header(tmp_path / split.path)
            assert (header.documents, header.tokens) == (split.documents, split.tokens)
            assert sum(split.tokens_by_modality.values()) == split.tokens
            ids = np.fromfile(tmp_path / f"{split.path}.bin", np.uint16)
            bits = np.unpackbits(np.fromfile(tmp_path / split.filler, np.uint8), count=ids.size)
            np.testing.assert_array_equal(bits, ids == FILLER_CODE)


def test_one_seed_writes_one_data_set(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny_dataset(tmp_path / name, seed=seed)
    first, same, other = (
        [path.read_bytes() for path in sorted((tmp_path / name).iterdir()) if path.suffix == ".bin"] for name in "abc"
    )
    assert first == same
    assert first != other


def test_config_takes_changes_by_dotted_key(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path / "runs", {"train.steps": 9, "loss.z": 0.5})
    assert (config.train.steps, config.loss.z, config.data.path) == (9, 0.5, str(tmp_path))
    assert "steps: 9" in write_config(config, tmp_path / "x.yaml").read_text()
