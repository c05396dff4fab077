"""Reads the samples of router tuning from memory-mapped files. Writes such files so that a folder is never incomplete.

`moe_dist.formats.tuning_manifest` describes the files. Shape letters: S samples, E embedding width, L MoE layers, C
columns.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_dist.errors import ConfigError, DataError, StorageError
from moe_dist.formats.manifest import MANIFEST_FILE, write_manifest
from moe_dist.formats.split_files import sampled_digest
from moe_dist.formats.tuning_manifest import ARRAYS, TuningManifest, file_problems, load_tuning_manifest, open_array
from moe_dist.runtime.files import make_writable


@dataclass(frozen=True)
class TuningSample:
    """The token ids of a prompt and of its right answer. Neither is empty.

    Attributes:
        choices: The distinct first token ids of the question's answers. The right answer comes first; -1 pads the array to
            the folder's width. All are -1 if a wrong answer begins with the right one's token. Empty if unknown.
    """

    prompt: np.ndarray
    answer: np.ndarray
    choices: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


class Samples:
    """The samples in a folder that `tools.prepare_router_tuning` made. All arrays except the lengths are memory-mapped.
    Raises ConfigError or DataError if the folder is missing or damaged. `digest` is the SHA-256 of the manifest, which
    contains the files' digests."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.manifest = load_tuning_manifest(folder)
        if problems := file_problems(folder, self.manifest):
            raise DataError(problems)
        self.digest = hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()
        arrays = {name: open_array(folder, name, self.manifest) for name in self.manifest.shapes()}
        self.embeddings_SE, self.routing_SLC = arrays["embeddings.npy"], arrays["routing.npy"]
        self._tokens = arrays["tokens.npy"]
        self._lengths_S2 = np.array(arrays["lengths.npy"], np.int64)  # a copy in memory, 16 bytes per sample
        ends_S = self._lengths_S2.sum(1).cumsum()
        self._starts_S = ends_S - self._lengths_S2.sum(1)
        if (self._lengths_S2 < 1).any() or ends_S[-1] != len(self._tokens):
            raise DataError(
                f"{folder}: lengths.npy has prompts or answers of no token, or has {ends_S[-1]} tokens in all, of which "
                f"tokens.npy has {len(self._tokens)}; prepare the folder again"
            )
        first_S = self._tokens[self._starts_S + self._lengths_S2[:, 0]]
        self._choices_SK = arrays.get("choices.npy", np.zeros((len(self), 0), np.int32))
        if "choices.npy" in arrays and not _tells(self._choices_SK, first_S, self.manifest.told):
            raise DataError(
                f"{folder}: choices.npy must have {self.manifest.told} rows that begin with the first token of their "
                "sample's answer, and -1 in all others; prepare the folder again"
            )

    def __len__(self) -> int:
        return self.manifest.samples

    def sample(self, number: int) -> TuningSample:
        """Returns copies of one sample's token ids and choices."""
        start, (prompt, answer) = int(self._starts_S[number]), self._lengths_S2[number].tolist()
        tokens = self._tokens[start : start + prompt + answer].astype(np.int64)
        return TuningSample(tokens[:prompt], tokens[prompt:], self._choices_SK[number].astype(np.int64))

    def prompts(self) -> list[np.ndarray]:
        """Returns the prompts of all samples, in the samples' order."""
        return [self.sample(number).prompt for number in range(len(self))]


def _tells(choices_SK: np.ndarray, first_S: np.ndarray, told: int) -> bool:
    """Returns True if exactly `told` rows begin with the first token of the answer and all other rows have only -1."""
    own_S = choices_SK[:, 0] == first_S
    return int(own_S.sum()) == told and bool((choices_SK[~own_S] == -1).all() and (choices_SK >= -1).all())


def _choices(ordered: Sequence["Scored"]) -> np.ndarray | None:
    """Returns the choices of all samples [S, K], padded with -1; None if the choices of any sample are unknown."""
    rows = [each.sample.choices for each in ordered]
    if not all(map(len, rows)):
        return None
    choices_SK = np.full((len(rows), max(map(len, rows))), -1)
    for row, choices in zip(choices_SK, rows, strict=True):
        row[: len(choices)] = choices
    return choices_SK


@dataclass(frozen=True)
class Scored:
    """A question that a trained model has answered."""

    task: str
    id: str
    text: str  # the text from which the embedding is computed
    sample: TuningSample
    right: bool  # True if the model's answer was right


def write_samples(
    out: Path, scored: Sequence[Scored], embeddings_SE: np.ndarray, routing_SLC: np.ndarray, facts: TuningManifest
) -> TuningManifest:
    """Writes a folder of samples, in which samples with `right` come first. The folder is written under a hidden name and
    renamed when it is complete. The next call of `write_samples` removes a folder that stayed incomplete.

    Args:
        out: The folder, which must not exist.
        scored, embeddings_SE, routing_SLC: One entry per question; all three have the same order.
        facts: Known fields of the manifest; `write_samples` adds the sizes, tasks and digests.

    Raises:
        ConfigError: `out` exists.
        StorageError: the folder cannot be written.
    """
    order = np.array(sorted(range(len(scored)), key=lambda row: not scored[row].right), np.int64)
    ordered = [scored[row] for row in order.tolist()]
    tasks: dict[str, tuple[int, int]] = {each.task: (0, 0) for each in scored}
    for each in scored:
        questions, right = tasks[each.task]
        tasks[each.task] = (questions + 1, right + each.right)
    lengths_S2 = np.array([[len(each.sample.prompt), len(each.sample.answer)] for each in ordered], np.int32)
    arrays = {
        "tokens.npy": np.concatenate([part for each in ordered for part in (each.sample.prompt, each.sample.answer)]),
        "lengths.npy": lengths_S2,
        "embeddings.npy": embeddings_SE[order],
        "routing.npy": routing_SLC[order],
    }
    if (choices_SK := _choices(ordered)) is not None:
        arrays["choices.npy"] = choices_SK
    refuse_existing(out)
    folder = out.parent / f".{out.name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(folder / name, np.ascontiguousarray(array, ARRAYS[name]), allow_pickle=False)
        lines = [{"task": each.task, "id": each.id, "right": each.right, "text": each.text} for each in ordered]
        (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        manifest = facts.model_copy(
            update={
                "tasks": {name: {"questions": questions, "right": right} for name, (questions, right) in tasks.items()},
                "samples": len(ordered),
                "right": sum(each.right for each in ordered),
                "longest": int(lengths_S2.sum(1).max()) - 1,  # the last token is only a label, not an input
                "choices": None if choices_SK is None else choices_SK.shape[1],
                "told": 0 if choices_SK is None else int((choices_SK[:, 0] >= 0).sum()),
                "columns": int(routing_SLC.shape[2]),
                "width": int(embeddings_SE.shape[1]),
                "digests": {name: sampled_digest(folder / name) for name in (*arrays, "questions.jsonl")},
            }
        )
        manifest = TuningManifest.model_validate_json(manifest.model_dump_json(warnings=False))
        write_manifest(manifest, folder)
        refuse_existing(out)
        folder.rename(out)  # atomic on one file system
    except OSError as error:
        raise StorageError(
            f"--out {out}: cannot be written: {error.strerror or error}; mend that or name another place, and begin again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def refuse_existing(out: Path) -> None:
    """Raises ConfigError if `out` exists."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out {out}: exists already, and nothing is overwritten; name another folder, or remove it")


def check_place(out: Path) -> None:
    """Raises ConfigError if the folder `out` exists or cannot be made. Call this function before the questions are scored,
    because scoring takes hours."""
    make_writable(out.parent, option=f"--out {out}")
    refuse_existing(out)
