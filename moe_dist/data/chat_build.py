"""Builds a data set of conversations and texts with the tokenizer of a Hugging Face folder."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from moe_dist.data.baselines import count_baselines
from moe_dist.data.chat import HubTokenizer
from moe_dist.data.chat_pictures import PictureChats
from moe_dist.data.chat_rows import MESSAGES, Encoded, Part, Row, encode_conversation, encode_text, write_parts
from moe_dist.data.corpus import Recipe, Skip
from moe_dist.data.corpus_build import write_split
from moe_dist.data.corpus_files import text_files
from moe_dist.data.families import hold_out, join
from moe_dist.data.picture_coding import Document
from moe_dist.data.picture_encoder import PictureEncoder, picture_ids
from moe_dist.data.tables import holds_table, raw_rows
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import Manifest, PicturesSection, SourceSection, write_manifest
from moe_dist.runtime.progress import Report

PICTURES = "pictures"  # link in a data set to the folder of its pictures
NAMED = 10  # number of bad rows that an error names


def build_chat(
    folder: Path,
    name: str,
    paths: Mapping[str, str],
    licence: str,
    recipe: Recipe,
    *,
    parts: Path,
    report: Report,
    skip: Skip,
) -> tuple[Manifest, list[str]]:
    """Writes a whole data set into `folder`, its manifest last.

    Args:
        paths: Maps the name of a source to a JSONL file, parquet file or datasets folder, or to a folder of texts. The
            source MESSAGES contains conversations; all other sources contain texts.
        parts: Folder for encoded rows. Rows that an interrupted call encoded there are not encoded again.

    Returns:
        The manifest, and warnings, each with its number of rows.

    Raises:
        ConfigError, DataError: raised by `HubTokenizer`, `raw_rows` or `text_files`; or a file has no row; or some rows are
            bad, and the recipe does not skip bad rows.
    """
    hub = HubTokenizer(Path(recipe.tokenizer or ""), recipe.chat_template, recipe.turns)
    encoded: dict[str, tuple[_SourceRows, list[Path]]] = {}
    modalities, pictures = _modalities(hub.size, ()), None
    ids = picture_ids(Path(recipe.tokenizer or "")) if MESSAGES in paths else None
    if ids is not None and ids.marks[-1] >= hub.size:
        raise DataError(
            f"{recipe.tokenizer}/config.json: token {ids.marks[-1]} of pictures is outside the tokenizer's {hub.size} ids; "
            "the folder has the files of two models, copy it again",
            see="docs/how-to/pictures.md",
        )
    for source, path in paths.items():
        rows = _SourceRows(source, Path(path), recipe, report, skip)
        if source != MESSAGES or ids is None:
            encoded[source] = rows, rows.encoded(hub, parts, licence)
            continue
        encoder, hub.parts = PictureEncoder(Path(recipe.tokenizer or ""), ids.each), ("text", "image")
        named = Path(path).resolve() if path.endswith(".tar") else Path(path)  # a linked shard has its own pictures
        root = (named.parent if named.is_file() else named).resolve()
        rows.encode = PictureChats(encoder, root, ids.image, ids.video, recipe.most_tokens)
        encoded[source] = rows, rows.encoded(hub, parts, licence)
        if rows.has_pictures:
            encoder.save(folder)
            (folder / PICTURES).symlink_to(root)
            modalities, pictures = _modalities(hub.size, ids.marks), PicturesSection(token_id=ids.image, folder=PICTURES)
    sources, notes = {}, []
    for source, (rows, files) in encoded.items():
        splits = {
            side: write_split(
                folder, f"{source}_{side}", _documents(files, chosen), modalities=modalities, with_filler=False
            )
            for side, chosen in rows.sides().items()
        }
        assert splits["train"] is not None  # `hold_out` leaves training data
        sources[source] = SourceSection(train=splits["train"], valid=splits["valid"], licence=licence)
        notes += rows.notes()
    manifest = Manifest(
        name=name,
        vocab_size=hub.size,
        modalities=modalities,
        pad_id=hub.pad_id,
        eos_id=hub.eos_id,
        pictures=pictures,
        sources=sources,
    )
    report("count baselines", 0, 1)
    baselines = {key: round(nats, 6) for key, nats in count_baselines(folder, manifest).items()}
    manifest = manifest.model_copy(update={"baselines": baselines})
    write_manifest(manifest, folder)
    report("count baselines", 1, 1)
    return manifest, notes


def _modalities(size: int, ids: Sequence[int]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Returns the id ranges of texts and, if a model has `ids` of pictures, of pictures."""
    edges = [-1, *ids, size]
    text = tuple((before + 1, after) for before, after in pairwise(edges) if before + 1 < after)
    return {"text": text, **({"image": tuple((each, each + 1) for each in ids)} if ids else {})}


class _SourceRows:
    """Encodes the rows of one source, and counts bad rows and warnings."""

    def __init__(self, source: str, path: Path, recipe: Recipe, report: Report, skip: Skip) -> None:
        self._source, self._path, self._recipe, self._report, self._skip = source, path, recipe, report, skip
        self._bytes = path.stat().st_size if path.is_file() and not holds_table(path) else 0
        self._option, self._done = "--messages" if source == MESSAGES else "text", 0
        self._sizes: list[np.ndarray] = []
        self._families: list[bytes] = []
        self._bad: list[str] = []
        self.encode: Callable[..., Encoded] = encode_conversation
        self.has_pictures = False
        self._notes: dict[str, tuple[int, str]] = {}  # for each warning, number of rows and place of the first row

    def encoded(self, hub: HubTokenizer, parts: Path, licence: str) -> list[Path]:
        """Returns the files of encoded rows."""
        self._report(f"encode {self._source}", 0, self._bytes or 1)
        # Pictures take tens of milliseconds each.
        limits = {"batch_rows": 16, "seconds": 60} if hub.parts != ("text",) and self._source == MESSAGES else {}
        files = write_parts(parts, self._source, *self._rows(licence), hub, self._count, **limits)
        if self._bad and not self._recipe.skip_bad:
            self._refuse()
        if not files:
            rows = "conversations" if self._source == MESSAGES else "texts"
            raise ConfigError(f"{self._option} {self._path}: holds no row; it needs {rows}, one in a line")
        if not self._families:
            raise DataError([f"{self._path}: no row is left", *self._bad[:NAMED]])
        self._report(f"encode {self._source}", self._bytes or 1, self._bytes or 1)
        return files

    def sides(self) -> dict[str, np.ndarray]:
        """Returns for each side of the split a mask of the encoded documents on that side."""
        sizes, seed = np.concatenate(self._sizes), self._recipe.seed
        held_out = hold_out(join(self._families), sizes, fraction=self._recipe.val_fraction, seed=seed)
        return {"train": ~held_out, "valid": held_out}

    def notes(self) -> list[str]:
        """Returns each warning once, with its number of rows and the place of its first row."""
        return [
            f"{self._source}: {count:,} {'rows' if count > 1 else 'row'}: {note} (the first: {first})"
            for note, (count, first) in self._notes.items()
        ]

    def _rows(self, licence: str) -> tuple[Iterable[Row], Callable[..., Encoded]]:
        if self._source == MESSAGES:
            return raw_rows(self._option, self._path), self.encode
        if self._path.is_file() or (self._path.exists() and holds_table(self._path)):
            return raw_rows(self._option, self._path), encode_text
        items = text_files(self._source, self._path, licence, self._skip).items
        return ((item.key, {"text": item.content}) for item in items), encode_text

    def _count(self, size: int, part: Part) -> None:
        self._done += size
        self._sizes.append(part.lengths_D)
        self.has_pictures |= any(part.pictures)
        self._families += [family.tobytes() for family in part.families_D]
        for note, place in part.notes:
            count, first = self._notes.get(note, (0, place))
            self._notes[note] = count + 1, first
        self._bad += part.bad
        if self._recipe.skip_bad:
            for problem in part.bad:
                self._skip(DataError(problem))
        elif len(self._bad) >= NAMED:
            self._refuse()
        if size:
            self._report(f"encode {self._source}", self._done, self._bytes)

    def _refuse(self) -> None:
        *others, last = self._bad[:NAMED]
        raise DataError([*others, f"{last}; or leave out all such rows with --skip-bad"])


def _documents(files: list[Path], chosen_D: np.ndarray) -> Iterator[Document]:
    first = 0
    for file in files:
        part = Part.load(file)
        yield from part.documents(chosen_D[first : first + len(part.lengths_D)])
        first += len(part.lengths_D)
