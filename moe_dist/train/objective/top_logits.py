"""Stores a teacher's most likely next tokens at each position of training sequences, in a folder of memory-mapped files:

    manifest.json     teacher, data, and the settings that determine the sequences
    keys.npy          int64 [N], a hash of the tokens and labels of each sequence
    words.npy         int32 [D, S, K], the K most likely next tokens; entries [N:] are unused
    log_probs.npy     float32 [D, S, K], the log-probabilities of words.npy

A run finds its sequences by their hashes. Runs with any number of ranks, any micro-batch or any number of resumes can
therefore use one folder. Repeated sequences are stored once. Shape letters: D sequences of the stream, N different
sequences among them, B sequences of a batch, S positions, K next tokens per position, V vocabulary.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from moe_dist.config.json_text import bounded
from moe_dist.config.regular_file import read_regular
from moe_dist.config.schema import Config
from moe_dist.data.batch import Batch
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.numpy_file import load_array
from moe_dist.model.objective import TeacherOutput

GUIDE = "docs/adapt.md"
KEY = "loss.distillation.top_logits"
_NAMES = ("keys.npy", "words.npy", "log_probs.npy")


class TopLogitsManifest(BaseModel):
    """The content of manifest.json."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal[1] = 1
    teacher: str  # folder of the teacher's checkpoint, for error messages
    content: str  # `checkpoint.base.content_hash` of the teacher's parameters
    vocab_size: int
    top: int  # K
    drawn: int  # D, the number of sequences that the teacher saw, counted from the beginning of the stream
    stored: int  # N, the number of different sequences; all of them are stored
    sequences: dict[str, JsonValue]  # settings on which the stream depends: section `data` without its path, and seed
    data: dict[str, str]  # `data_digest` of the data set, including its manifest, which names the tokenizer


def sequence_settings(config: Config) -> dict[str, JsonValue]:
    """Returns the settings that, together with the data set, determine the training sequences of a run."""
    unset = {"path"} if config.data.skip else {"path", "skip"}  # folders of earlier versions lack `skip`
    return {**config.data.model_dump(mode="json", exclude=unset), "seed": config.run.seed}


def sequence_keys(batch: Batch) -> np.ndarray:
    """Returns a hash of the tokens and labels of each sequence, int64 [B]. On CUDA this needs a host sync."""
    rows = torch.cat([batch.tokens_BS, batch.labels_BS], dim=1).cpu().numpy()
    return np.array([int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "big", signed=True)
                     for row in rows], np.int64)  # fmt: skip


def write_top_logits(
    out: Path, outputs: Iterable[tuple[Batch, TeacherOutput]], manifest: TopLogitsManifest, *, seq_len: int
) -> TopLogitsManifest:
    """Writes the folder `out` from the teacher's log-probabilities [B, S, V]. Returns the manifest with the number of
    stored sequences. Raises ConfigError if `out` exists. `outputs` yields each batch with the teacher's output for it; the
    batches contain at most `manifest.drawn` sequences in total."""
    if out.exists():
        raise ConfigError(f"--out {out}: exists; nothing is overwritten: remove it, or choose another folder")
    place = out.with_name(f"{out.name}.writing")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    shape, known = (manifest.drawn, seq_len, manifest.top), {}
    words = open_memmap(place / "words.npy", "w+", np.int32, shape)
    log_probs = open_memmap(place / "log_probs.npy", "w+", np.float32, shape)
    for batch, output in outputs:
        best = output.log_prob_BSK.topk(manifest.top, dim=-1)
        for row, key in enumerate(sequence_keys(batch).tolist()):
            at = known.setdefault(key, len(known))
            words[at], log_probs[at] = best.indices[row].cpu().numpy(), best.values[row].cpu().numpy()
    words.flush()
    log_probs.flush()
    np.save(place / "keys.npy", np.array([*known], np.int64))
    manifest = manifest.model_copy(update={"stored": len(known)})
    (place / "manifest.json").write_text(manifest.model_dump_json(indent=1))
    place.rename(out)  # done last, so that a folder named `out` is always complete
    return manifest


class TopLogits:
    """Reads a teacher's output from a folder written by `write_top_logits`. Log-probabilities stay on disk until a batch
    needs them.

    Raises:
        ConfigError: the folder is missing, or was made for other sequences. The error lists every reason.
        DataError: the folder is damaged.
    """

    def __init__(self, folder: str, config: Config, digest: Mapping[str, str]) -> None:
        self._folder, path = folder, Path(folder)
        if not (path / "manifest.json").is_file():
            raise ConfigError(f"{KEY}={folder!r}: no manifest.json there; make it with `moe-dist teach`", see=GUIDE)
        try:
            raw = read_regular(path / "manifest.json", most_bytes=1 << 24)
            manifest = TopLogitsManifest.model_validate_json(bounded(raw))
            keys_N, words, log_probs = (load_array(path / name) for name in _NAMES)
        except (OSError, ValueError, ValidationError) as error:
            raise DataError(f"{KEY}={folder!r}: damaged: {error!s:.200}; make it again", see=GUIDE) from error
        shape = (manifest.drawn, config.data.seq_len, manifest.top)
        if problems := _problems(manifest, config, digest):
            raise ConfigError([f"{KEY}={folder!r}: {problem}" for problem in problems], see=GUIDE)
        if words.shape != shape or log_probs.shape != shape or keys_N.shape != (manifest.stored,):
            raise DataError(
                f"{KEY}={folder!r}: an array has another shape than its manifest says; make it again", see=GUIDE
            )
        self._words, self._log_probs = words, log_probs
        self._order_N = np.argsort(keys_N, kind="stable")
        self._sorted_N = np.asarray(keys_N)[self._order_N]

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Returns the teacher's output for a batch, on the batch's device. Raises DataError if a sequence is not in the
        folder."""
        keys = sequence_keys(batch)
        at = np.searchsorted(self._sorted_N, keys).clip(max=len(self._sorted_N) - 1)
        if not np.array_equal(self._sorted_N[at], keys):
            raise DataError(
                f"{KEY}={self._folder!r}: it lacks a sequence of this step, although its manifest has this data set and "
                "these settings; with run.keep_position the stream begins elsewhere: make it again",
                see=GUIDE,
            )
        rows, device = self._order_N[at], batch.tokens_BS.device
        words = torch.from_numpy(self._words[rows].astype(np.int64)).to(device)
        return TeacherOutput(torch.from_numpy(self._log_probs[rows]).to(device), words)


def _problems(manifest: TopLogitsManifest, config: Config, digest: Mapping[str, str]) -> list[str]:
    """Returns the reasons why the folder does not fit this run's sequences and vocabulary."""
    again = "make it again for this run"
    problems = [
        f"its {name} is {manifest.sequences.get(name)!r}, the run's is {value!r}; take that, or {again}"
        for name, value in json.loads(json.dumps(sequence_settings(config))).items()
        if manifest.sequences.get(name) != value
    ]
    changed = [name for name in dict.fromkeys([*manifest.data, *digest]) if manifest.data.get(name) != digest.get(name)]
    if changed:
        problems.append(f"{', '.join(changed[:3])} of data.path={config.data.path!r} is another file than it was; {again}")
    if manifest.vocab_size != config.model.vocab_size:
        problems.append(
            f"the teacher's vocab_size={manifest.vocab_size}, model.vocab_size={config.model.vocab_size}; take a teacher "
            "with the model's tokenizer"
        )
    needed = config.train.steps * config.train.global_batch
    if manifest.drawn < needed:
        problems.append(
            f"has {manifest.drawn} sequences; train.steps={config.train.steps} x train.global_batch="
            f"{config.train.global_batch} needs {needed}; {again}, or lower train.steps"
        )
    return problems
