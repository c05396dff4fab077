"""Writes a data set of documents with a prompt and an answer. Only the answer is scored."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moe_dist.data.baselines import count_baselines
from moe_dist.data.indexed import write_indexed
from moe_dist.data.prepare import renamed_when_complete
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest, SourceSection, SplitSection, write_manifest
from moe_dist.formats.split_files import count_by_modality

Document = tuple[np.ndarray, np.ndarray]  # token ids, and a mask that is true for tokens of the prompt


def check_new(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"--out {out}: is there already; remove it, or name another")


@contextmanager
def data_folder(out: Path, base: Path, manifest: Manifest, files: Iterable[str | None] = ()) -> Iterator[Path]:
    """Makes a folder that contains the tokenizer, codebook and `files` of the base data set. If the `with` block succeeds,
    renames the folder to `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    codebook = manifest.image.codebook if manifest.image is not None else None
    with renamed_when_complete(out) as folder:
        for name in filter(None, (manifest.tokenizer, codebook, *files)):
            shutil.copyfile(base / name, folder / name)
        yield folder


def instructed_document(prompt: Iterable[int], answer: Iterable[int], *, eos_id: int) -> Document:
    """Makes a document of a prompt, its answer, and the end-of-document token."""
    read = list(prompt)
    tokens = np.array([*read, *answer, eos_id], np.int64)
    return tokens, np.arange(len(tokens)) < len(read)


def write_split(folder: Path, name: str, documents: Iterable[Document], manifest: Manifest) -> SplitSection:
    """Writes the files of a split into `folder`. Vocabulary and modalities are taken from the manifest."""
    every = list(documents)
    write_indexed(folder / name, (tokens for tokens, _ in every), vocab_size=manifest.vocab_size)
    np.save(folder / f"{name}_prompt.npy", np.packbits(np.concatenate([prompt for _, prompt in every])))
    return SplitSection(
        path=name,
        documents=len(every),
        tokens=sum(len(tokens) for tokens, _ in every),
        tokens_by_modality=count_by_modality(folder / name, manifest.modalities),
        prompt=f"{name}_prompt.npy",
    )


def write_sources(folder: Path, base: Manifest, name: str, sources: Mapping[str, SourceSection]) -> Manifest:
    """Writes the manifest of a new data set. It is the base's manifest with the sources `sources`, and with baselines that
    are counted from these sources."""
    manifest = base.model_copy(update={"name": name, "sources": dict(sources), "baselines": {}})
    manifest = manifest.model_copy(update={"baselines": count_baselines(folder, manifest)})
    write_manifest(manifest, folder)
    return manifest
