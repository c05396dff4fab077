"""Defines the schema of `manifest.json`, which describes a prepared data set, in the set's folder. Imports no torch."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from moe_dist.config.base.section import RESERVED_MODALITIES, Count, Name, PathText, PositiveInt, Section, Violation
from moe_dist.config.json_text import read_json
from moe_dist.config.partial import draft
from moe_dist.errors import ConfigError, DataError

MANIFEST_FILE = "manifest.json"
MAX_BYTES = 1 << 24  # largest size of a manifest; a source and its splits take about 1 KB


def _inside(path: str) -> str:
    """Rejects paths outside the manifest's folder, because a manifest may come from an untrusted place."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(
            f"{path!r} leads out of the data set's folder; name a file in it (a symbolic link there may point anywhere)"
        )
    return path


FilePath = Annotated[PathText, AfterValidator(_inside)]
IdRange = tuple[Count, PositiveInt]  # a range of token ids, as [first, last + 1]


class SplitSection(Section):
    """One indexed data set of Megatron, in the files <path>.bin and <path>.idx."""

    path: FilePath = Field(description="Prefix of the .bin and .idx files, relative to the manifest.")
    documents: PositiveInt = Field(description="Documents in the index.")
    tokens: PositiveInt = Field(description="Tokens in the index.")
    tokens_by_modality: dict[Name, Count] = Field(default_factory=dict, description="Tokens of each modality.")
    filler: FilePath | None = None
    """File with one bit per token, in file order, packed by numpy.packbits. A bit is 1 for an empty cell of a picture."""
    prompt: FilePath | None = None
    """File in the format of `filler`. A bit is 1 for a token of a prompt, which is an input but not a label."""
    pictures: FilePath | None = None
    """Prefix of the files .jsonl and .npy, which have the pictures of each document (data/picture_files.py)."""


class SourceSection(Section):
    """One source of documents, with its training and held-out splits."""

    train: SplitSection
    valid: SplitSection | None = None
    licence: str = Field(description="Licence of the contents.")
    attribution: str = Field(default="", description="Credit that the licence asks for.")


class ImageSection(Section):
    """The form of pictures as tokens: a grid of codes between a begin token and an end token."""

    grid: tuple[PositiveInt, PositiveInt] = Field(description="Rows and columns of codes.")
    begin_id: Count = Field(description="Id of the token before the codes.")
    end_id: Count = Field(description="Id of the token after the codes.")
    codebook: FilePath | None = None
    """A .npy file with the pixels of each code, uint8 [codes, patch, patch, 3]."""
    vq_model: FilePath | None = None
    """Folder, or link to a folder, of the VQ model that encoded the pictures."""
    vq_digest: str | None = Field(default=None, description="SHA-256 of that model and its image processor.")
    code_ids: FilePath | None = None
    """A .npy file with the token id of each code, int64 [codes]. null: the ids of the modality image, in order."""


class PicturesSection(Section):
    """Pictures that an encoder reads. Each has placeholder tokens. The set's folder has the preprocessor_config.json."""

    token_id: Count = Field(description="Id of the placeholder tokens.")
    folder: FilePath = Field(description="Folder, or link to a folder, of the picture files or shards.")


class Manifest(Section):
    """A prepared data set. Paths are relative to the manifest."""

    format: Annotated[int, Field(ge=1, le=1)] = 1
    name: str
    vocab_size: PositiveInt = Field(description="Largest permitted token id plus 1.")
    modalities: dict[Name, tuple[IdRange, ...]] = Field(min_length=1)
    """Id ranges of each modality, as [first, last + 1]. Together they cover the vocabulary without overlap."""
    pad_id: Count = Field(description="Id of padding, which is never a label.")
    eos_id: Count = Field(description="Id of the last token of a document.")
    tokenizer: FilePath | None = Field(default=None, description="JSON file of the library tokenizers.")
    image: ImageSection | None = None
    pictures: PicturesSection | None = None
    sources: dict[Name, SourceSection] = Field(min_length=1)
    baselines: dict[str, float] = Field(default_factory=dict)
    """Held-out losses, in nats per token, of models that count training tokens. Keys are 'text/unigram',
    'image/left_bigram', 'image_no_filler/unigram' and so on."""

    def violations(self) -> Iterator[Violation]:
        for problem in self._range_problems():
            yield Violation(("modalities", "vocab_size"), problem)
        for name in self.modalities:
            if name in RESERVED_MODALITIES or name.endswith("_no_filler"):
                problem = f"modalities: the name {name!r} is reserved for a loss; choose another name"
                yield Violation(("modalities",), problem)
        marks = {"pad_id": self.pad_id, "eos_id": self.eos_id}
        if self.image is not None:
            marks |= {"image.begin_id": self.image.begin_id, "image.end_id": self.image.end_id}
        if self.pictures is not None:
            marks["pictures.token_id"] = self.pictures.token_id
        for key, value in marks.items():
            if value >= self.vocab_size:
                problem = f"{key}={value} lies outside [0, vocab_size={self.vocab_size})"
                yield Violation((key, "vocab_size"), problem)
        for key, split in self.splits():
            counts = split.tokens_by_modality
            if unknown := [name for name in counts if name not in self.modalities]:
                problem = (
                    f"{key}.tokens_by_modality: {', '.join(unknown)} not among the modalities {', '.join(self.modalities)}"
                )
                yield Violation((key, "modalities"), problem)
            elif counts and sum(counts.values()) != split.tokens:
                problem = f"{key}: tokens={split.tokens}, but tokens_by_modality adds up to {sum(counts.values())}"
                yield Violation((key,), problem)

    def splits(self) -> Iterator[tuple[str, SplitSection]]:
        """Yields every split with its dotted key."""
        for name, source in self.sources.items():
            yield f"sources.{name}.train", source.train
            if source.valid is not None:
                yield f"sources.{name}.valid", source.valid

    def _range_problems(self) -> list[str]:
        """Returns an error text for each gap or overlap between id ranges, and for each range outside the vocabulary."""
        problems, at = [], 0
        ranges = sorted((first, end, name) for name, every in self.modalities.items() for first, end in every)
        for first, end, name in ranges:
            where = f"modalities.{name}: [{first}, {end})"
            if end <= first:
                problems.append(f"{where} is empty; a range is [first, last + 1]")
            elif first != at:
                what = "leaves a gap after" if first > at else "overlaps"
                problems.append(f"{where} {what} the range that ends at {at}; each id belongs to one modality")
            if end > self.vocab_size:
                problems.append(f"{where} lies outside [0, vocab_size={self.vocab_size})")
            at = max(at, end)
        if at < self.vocab_size:
            problems.append(
                f"modalities cover ids below {at} only, but vocab_size={self.vocab_size}; each id needs a modality"
            )
        return problems


def load_manifest(folder: str | Path) -> Manifest:
    """Reads and checks `folder`/manifest.json.

    Raises:
        ConfigError: the manifest does not exist; the error names the command that makes a manifest.
        DataError: the manifest is invalid; the error lists every fault.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise ConfigError(
            f"data.path={str(folder)!r}: no {MANIFEST_FILE} there; make the default data with "
            f"`moe-dist prepare-data --out {shlex.quote(str(folder))}`, or your own (docs/data.md)"
        )
    try:
        values = read_json(path, most_bytes=MAX_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; see docs/data.md") from error
    except ValueError as error:
        raise DataError(f"{path}: no JSON ({error}); see docs/data.md") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: must be an object with the keys {', '.join(Manifest.model_fields)}; see docs/data.md")
    return draft(Manifest, values).checked(
        Manifest.violations, lambda problems: DataError([f"{path}: {problem}" for problem in problems], see="docs/data.md")
    )


_LATER = ("pictures", "vq_model", "vq_digest", "code_ids")


def write_manifest(manifest: BaseModel, folder: str | Path) -> None:
    """Writes a manifest, of a data set or of router tuning, to `folder`/manifest.json."""
    values = _without_later(manifest.model_dump(mode="json"))
    (Path(folder) / MANIFEST_FILE).write_text(json.dumps(values, indent=1) + "\n")


def _without_later(values: Any) -> Any:
    """Leaves out later keys without a value, so that equal data of earlier versions have an equal digest."""
    if not isinstance(values, dict):
        return values
    return {key: _without_later(value) for key, value in values.items() if key not in _LATER or value is not None}
