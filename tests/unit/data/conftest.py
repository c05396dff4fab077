"""Fixtures of the data tests: small data sets of hand-made documents, and the default corpus with few renders."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moe_dist.data import pictures as pictures_module
from moe_dist.data.corpus import Picture, Recipe, Source
from moe_dist.data.indexed import write_indexed
from moe_dist.data.picture_coding import Division
from moe_dist.data.pictures import Render
from moe_dist.formats.manifest import Manifest, SourceSection, SplitSection, write_manifest
from moe_dist.formats.split_files import count_by_modality

MODALITIES = {"text": ((0, 100), (200, 10_000)), "image": ((100, 200),)}
Documents = Sequence[Sequence[int]]
MakeSet = Callable[..., Manifest]


@dataclass(frozen=True)
class Prepared:
    """The prepared default corpus. `rendered` has the keys of the pictures that were rendered."""

    folder: Path
    manifest: Manifest
    recipe: Recipe
    pictures: Source[Picture]
    division: Division
    rendered: frozenset[str]


@pytest.fixture(scope="session")
def megatron() -> ModuleType:
    """Returns Megatron's own reader and writer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.fixture(scope="session")
def make_set() -> MakeSet:
    """Call it as make_set(folder, {source: (train documents, valid documents or None)}, filler={split path: bits},
    prompt=...)."""

    def make(
        folder: Path,
        sources: Mapping[str, tuple[Documents, Documents | None]],
        filler: Mapping[str, Sequence[int]] | None = None,
        prompt: Mapping[str, Sequence[int]] | None = None,
    ) -> Manifest:
        folder.mkdir(parents=True, exist_ok=True)
        marks = {"filler": filler or {}, "prompt": prompt or {}}

        def split(path: str, documents: Documents | None) -> SplitSection | None:
            if documents is None:
                return None
            write_indexed(folder / path, map(np.array, documents), vocab_size=10_000)
            files = {kind: f"{path}_{kind}.npy" for kind, bits in marks.items() if path in bits}
            for kind, file in files.items():
                np.save(folder / file, np.packbits(np.array(marks[kind][path], bool)))
            return SplitSection(
                path=path,
                documents=len(documents),
                tokens=sum(map(len, documents)),
                tokens_by_modality=count_by_modality(folder / path, MODALITIES),
                **files,
            )

        sections = {}
        for name, (train, valid) in sources.items():
            sides = {"train": split(f"{name}_train", train), "valid": split(f"{name}_valid", valid)}
            sections[name] = SourceSection(**sides, licence="none")
        manifest = Manifest(name="hand", vocab_size=10_000, modalities=MODALITIES, pad_id=0, eos_id=1, sources=sections)
        write_manifest(manifest, folder)
        return manifest

    return make


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Prepares the default corpus with two renders per picture. Rendering takes most of the time of the data tests."""
    from moe_dist.data import corpus_build, picture_coding
    from moe_dist.data.corpus_packages import openmoji
    from moe_dist.data.prepare import Inputs, prepare

    divisions: list[Division] = []
    rendered: set[str] = set()

    def augmented(raster: np.ndarray, *, key: str, **rest: Any) -> Render:
        rendered.add(key)
        return pictures_module.augmented(raster, key=key, **rest)

    def divide(*arguments: Any) -> Division:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(picture_coding, "augmented", augmented)
            divisions.append(picture_coding.divide(*arguments))
        return divisions[-1]

    folder = tmp_path_factory.mktemp("default") / "openmoji"
    recipe = Recipe(renders=2, heldout_renders=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_build, "divide", divide)
        manifest, built = prepare(folder, Inputs(), recipe, lambda stage, done, total: None)
    assert built
    return Prepared(folder, manifest, recipe, openmoji(), divisions[0], frozenset(rendered))
