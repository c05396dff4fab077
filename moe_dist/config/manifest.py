"""The manifest of a prepared data set: what `manifest.json` beside the .bin/.idx files says. Imports no torch."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt, ValidationError, model_validator

from moe_dist.config.schema import Count, Name, Section
from moe_dist.errors import ConfigError, DataError

MANIFEST_FILE = "manifest.json"
IdRange = tuple[Count, PositiveInt]  # [first, past the last)


class SplitSection(Section):
    """One Megatron indexed data set: <path>.bin and <path>.idx, relative to the manifest."""

    path: str = Field(description="Prefix of the .bin and .idx files, relative to the manifest.")
    documents: PositiveInt = Field(description="Documents in the index.")
    tokens: PositiveInt = Field(description="Tokens in the index.")
    tokens_by_modality: dict[Name, Count] = Field(default_factory=dict, description="Tokens of each modality.")
    filler: str | None = Field(
        default=None,
        description="Bits, one a token in file order, packed by numpy.packbits: 1 where an image cell is empty.",
    )


class SourceSection(Section):
    train: SplitSection
    valid: SplitSection | None = None
    licence: str = Field(description="Licence of the contents.")
    attribution: str = Field(default="", description="Credit that the licence asks for.")


class ImageSection(Section):
    """How a picture became tokens: a grid of codes between two marks."""

    grid: tuple[PositiveInt, PositiveInt] = Field(description="Rows and columns of codes.")
    begin_id: Count = Field(description="Token before the codes.")
    end_id: Count = Field(description="Token after the codes.")
    codebook: str | None = Field(
        default=None, description=".npy of uint8 [codes, patch, patch, 3], relative to the manifest."
    )


class Manifest(Section):
    format: Annotated[int, Field(ge=1, le=1)] = 1
    name: str
    vocab_size: PositiveInt = Field(description="One more than the largest id that may appear.")
    modalities: dict[Name, tuple[IdRange, ...]] = Field(
        min_length=1, description="Id ranges of each modality, [first, past the last); together they cover the vocabulary."
    )
    pad_id: Count = Field(description="Id that fills up a sequence; never a label.")
    eos_id: Count = Field(description="Id that ends a document.")
    tokenizer: str | None = Field(default=None, description="tokenizers JSON file, relative to the manifest.")
    image: ImageSection | None = None
    sources: dict[Name, SourceSection] = Field(min_length=1)
    baselines: dict[str, float] = Field(
        default_factory=dict,
        description="Held-out nats a token of count models fitted on the training tokens: 'text/unigram', "
        "'image/left_bigram', 'image_no_filler/unigram', ...",
    )

    @model_validator(mode="after")
    def _ranges_cover(self) -> "Manifest":
        ranges = sorted((first, end, name) for name, rs in self.modalities.items() for first, end in rs)
        at = 0
        for first, end, name in ranges:
            if first != at or end <= first:
                raise ValueError(
                    f"modalities: range [{first}, {end}) of {name!r} must begin at {at} and not be empty: "
                    f"the ranges must cover [0, vocab_size={self.vocab_size}) once"
                )
            at = end
        if at != self.vocab_size:
            raise ValueError(f"modalities cover ids up to {at}, but vocab_size={self.vocab_size}")
        return self

    def tokens_by_modality(self) -> dict[str, int]:
        """Training tokens of each modality over all sources."""
        totals = dict.fromkeys(self.modalities, 0)
        for source in self.sources.values():
            for name, count in source.train.tokens_by_modality.items():
                totals[name] = totals.get(name, 0) + count
        return totals


def load_manifest(folder: str | Path) -> Manifest:
    """Reads and checks `folder`/manifest.json.

    Raises:
        ConfigError: there is no manifest (the message has the command that makes one).
        DataError: it is not a valid manifest.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise ConfigError(
            f"data.path={str(folder)!r}: no {MANIFEST_FILE} there; make the default data with "
            f"`python -m tools.prepare_data --out {folder}`, or your own (docs/data.md)"
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors())
        raise DataError(f"{path}: {faults}; see docs/data.md") from error


def write_manifest(manifest: Manifest, folder: str | Path) -> None:
    """Writes `folder`/manifest.json."""
    (Path(folder) / MANIFEST_FILE).write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")
