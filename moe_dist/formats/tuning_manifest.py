"""Reads and checks the folder of samples for router tuning. The folder has S samples, whose routing is stored for L layers
with C router columns each. A sample's question has at most K choices.

    manifest.json      run, checkpoint, embedder, tasks; shapes and digests of the files
    tokens.npy         int32 [tokens], the concatenated samples: prompt, then right answer
    lengths.npy        int32 [S, 2], tokens of each sample's prompt and answer
    embeddings.npy     float32 [S, width], embedding of each question
    routing.npy        float32 [S, L, C], each router's softmax at the prompt's last token
    choices.npy        int32 [S, K], different first tokens of the question's choices, the right choice's first, then -1;
                       all -1 if a wrong choice has the same first token. Folders of older versions lack this file
    questions.jsonl    task, id, text and success of each sample; no program reads it

Samples that the run answered correctly come first, so they are the first rows of each array. This module imports no torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue, ValidationError

from moe_dist.config.json_text import first_fault
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import MANIFEST_FILE
from moe_dist.formats.numpy_file import load_array
from moe_dist.formats.split_files import sampled_digest

GUIDE = "docs/router-tuning.md"
ARRAYS: Mapping[str, type[np.generic]] = {
    "tokens.npy": np.int32,
    "lengths.npy": np.int32,
    "embeddings.npy": np.float32,
    "routing.npy": np.float32,
    "choices.npy": np.int32,
}
_AGAIN = "prepare the folder again"
_MAX_BYTES = 1 << 20  # largest size of a manifest; a valid manifest has a few kilobytes
_Size = Annotated[int, Field(ge=0)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class TaskCount(_Stored):
    """The numbers of a task's questions."""

    questions: _Size
    right: _Size  # number of questions that the run answered correctly


class TuningManifest(_Stored):
    """The content of manifest.json."""

    format: Literal[1] = 1
    checkpoint: _Sha256  # `LoadedRun.digest` of the parameters that answered the questions
    run: str  # folder of the checkpoint that answered the questions; used in error texts
    step: _Size
    model: dict[str, JsonValue]  # the section `model` of the scored run's configuration
    tokenizer: _Sha256  # SHA-256 of the data set's tokenizer.json
    embedder: _Sha256  # SHA-256 of the embedder's files
    embedder_name: str  # name of the embedder; used in error texts
    tasks: dict[str, TaskCount]
    samples: _Size
    right: _Size  # number of samples that the run answered correctly; they come first
    longest: _Size  # number of input tokens of the longest sample; its last token is only a label
    layers: Annotated[tuple[_Size, ...], FailFast()]  # indices of the L transformer layers with stored routing
    columns: _Size  # number C of router columns in a layer
    width: _Size  # width of an embedding
    # number of columns (K) in choices.npy; None in folders of older versions, which lack this file
    choices: Annotated[int, Field(ge=1)] | None = None
    told: _Size = 0  # number of samples in which no wrong choice has the right choice's first token
    options: dict[str, JsonValue]  # how questions were selected and asked: side, seed, rotations, measure
    digests: dict[str, str]  # digest of each file, by file name

    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Maps each array file that the folder has to the required shape. None stands for any length."""
        shapes = {
            "tokens.npy": (None,),
            "lengths.npy": (self.samples, 2),
            "embeddings.npy": (self.samples, self.width),
            "routing.npy": (self.samples, len(self.layers), self.columns),
        }
        return shapes if self.choices is None else {**shapes, "choices.npy": (self.samples, self.choices)}


def load_tuning_manifest(folder: str | Path) -> TuningManifest:
    """Reads `folder`/manifest.json.

    Raises:
        ConfigError: the manifest does not exist; the error names the command that makes a manifest.
        DataError: the manifest is damaged.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise ConfigError(
            f"router_tuning.data={str(folder)!r}: no {MANIFEST_FILE} there; make the folder with `moe-dist "
            "prepare-router-tuning RUN --tasks ... --out FOLDER`; a run of this command that was interrupted leaves none",
            see=GUIDE,
        )
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes, too large to be a manifest", see=GUIDE)
        manifest = TuningManifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}", see=GUIDE) from error
    except ValidationError as error:
        raise DataError(f"{path}: damaged: {first_fault(error)}; {_AGAIN}", see=GUIDE) from error
    if not 0 <= manifest.right <= manifest.samples or not manifest.samples or not manifest.layers:
        raise DataError(
            f"{path}: damaged: samples={manifest.samples}, right={manifest.right}, layers={list(manifest.layers)} must be "
            f"at least one sample and layer, and right at most samples; {_AGAIN}",
            see=GUIDE,
        )
    return manifest


def file_problems(folder: str | Path, manifest: TuningManifest) -> list[str]:
    """Returns an error text for each file that is missing, changed, or of another shape than the manifest says. Reads at
    most 4 MiB of each file."""
    folder, problems = Path(folder), []
    for name in (*manifest.shapes(), "questions.jsonl"):
        path = folder / name
        try:
            found = sampled_digest(path)
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror or error}; {_AGAIN}")
            continue
        if found != manifest.digests.get(name):
            problems.append(f"{path}: {found}, but {manifest.digests.get(name, 'nothing')} was written; {_AGAIN}")
        elif name in ARRAYS:
            try:
                open_array(folder, name, manifest)
            except DataError as error:
                problems += error.problems
    return problems


def open_array(folder: Path, name: str, manifest: TuningManifest) -> np.ndarray:
    """Memory-maps the array file `name`, one of ARRAYS. Raises DataError if the file is missing, is not a plain array, or
    has another shape or type than the manifest says."""
    path, shape = folder / name, manifest.shapes()[name]
    try:
        array = load_array(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a plain array: {error}; {_AGAIN}", see=GUIDE) from error
    fits = len(array.shape) == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if array.dtype != ARRAYS[name] or not fits:
        raise DataError(
            f"{path}: {array.dtype} {list(array.shape)}, but the manifest says {np.dtype(ARRAYS[name])} "
            f"{['any' if want is None else want for want in shape]}; {_AGAIN}",
            see=GUIDE,
        )
    return array
