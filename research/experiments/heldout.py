"""Reads the held-out sequences on which experiments are measured. Pilots are measured on `validation` sequences."""

from moe_dist.config.schema import Config
from moe_dist.data.batch import Batch
from moe_dist.data.loader import heldout_batches, source_shares
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest, load_manifest
from research.experiments.study import MeasureSection


def check_validation(section: MeasureSection, config: Config) -> None:
    """Checks, before a pilot trains, that each source has more held-out sequences than the test sequences.

    Raises:
        ConfigError: a source has no such sequences.
    """
    manifest = load_manifest(config.data.path)
    for source in source_shares(manifest, config.data.weights):
        try:
            heldout_sequences(config, manifest, source, section.sequences, validation=True)
        except ConfigError as error:
            raise ConfigError(f"measure.sequences={section.sequences}: {error}") from error


def heldout_sequences(config: Config, manifest: Manifest, source: str, sequences: int, *, validation: bool) -> list[Batch]:
    """Returns batches of a source's held-out sequences for one rank."""
    return heldout_batches(
        config.data.path,
        manifest,
        source=source,
        seq_len=config.data.seq_len,
        sequences=sequences,
        micro_batch=config.train.micro_batch,
        rank=0,
        world_size=1,
        validation=validation,
    )
