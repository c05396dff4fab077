"""Writes documents with an unscored prompt and a scored answer, as a split of a data set."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from moe_dist.config.manifest import Manifest, SourceSection, SplitSection, write_manifest
from moe_dist.config.split_files import count_by_modality
from moe_dist.data.baselines import count_baselines
from moe_dist.data.indexed import write_indexed

Document = tuple[np.ndarray, np.ndarray]  # token ids, and the mask of the prompt's tokens


def instructed_document(prompt: Iterable[int], answer: Iterable[int], *, eos_id: int) -> Document:
    """A prompt, its answer, and the end mark."""
    read = list(prompt)
    tokens = np.array([*read, *answer, eos_id], np.int64)
    return tokens, np.arange(len(tokens)) < len(read)


def write_split(folder: Path, name: str, documents: Iterable[Document], manifest: Manifest) -> SplitSection:
    """Writes the files of a split into `folder`, beside those of other splits; vocabulary and modalities are the
    manifest's."""
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
    """Writes the manifest of a data set with other sources than its base, and with their baselines."""
    manifest = base.model_copy(update={"name": name, "sources": dict(sources), "baselines": {}})
    manifest = manifest.model_copy(update={"baselines": count_baselines(folder, manifest)})
    write_manifest(manifest, folder)
    return manifest
