"""Reads other systems' records of routing as steps of a trace. These records have no token ids and no modalities. Each
token therefore gets the id -1, and all experts form one group.

READERS has a pattern of file names, and a reader, for each format. Shape letters are as in `format.py`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from moe_dist.config.json_text import parse_json
from moe_dist.config.timed import TimedCalls
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.numpy_file import load_array
from moe_dist.monitor.trace.format import TOKEN, Manifest
from moe_dist.monitor.trace.reader import TracedStep, open_file
from moe_dist.placement.placement import ExpertGroup

NO_ID = -1
_LIMITS = (TimeoutError, ChildProcessError, MemoryError)  # errors of TimedCalls
FLAME_TOKENS = 1 << 16  # largest number of tokens read from each file of FLAME-MoE-Traces
_MOST_BYTES, _MOST_FLAME = 1 << 30, 1 << 27  # largest sizes of an array's file, and of a parquet file's first rows
_MOST_LINE = 1 << 25  # largest number of bytes in a line of Megatron-Core's trace; a longer one is cut, and no JSON
Parts = Iterator[tuple[int, tuple[int, ...], np.ndarray]]  # step, layers (L), and ids [T, L, K] of one sequence or one rank


class ForeignTrace:
    """Traced steps of another system. Has those members of `Trace` that a report reads: `steps` and `step`."""

    def __init__(self, steps: dict[int, TracedStep]) -> None:
        self._steps, self.steps = steps, tuple(sorted(steps))

    def step(self, number: int) -> TracedStep:
        return self._steps[number]


def read_foreign(path: Path, num_experts: int) -> ForeignTrace:
    """Reads the file `path`, or all files of one format in the folder `path`.

    Args:
        num_experts: Number of experts per layer. No format contains this number.

    Raises:
        ConfigError: no file has a known name.
        DataError: a file is damaged, has an id that the model lacks, or has other layers than the first file.
    """
    for pattern, reader in READERS.items():
        files = sorted(path.glob(pattern)) if path.is_dir() else [path] * path.match(pattern)
        if files:
            return _trace(path, reader(files), num_experts)
    raise ConfigError(f"{path}: no file named like {' or '.join(READERS)}; give a file or folder of such files")


def routed_group(num_experts: int, top_k: int) -> ExpertGroup:
    """Returns all experts of another system's model as one group with one modality. The unknown FFN width is set to 1."""
    return ExpertGroup("routed", num_experts, 0, top_k, 1, 0, ("tokens",))


def _trace(path: Path, parts: Parts, num_experts: int) -> ForeignTrace:
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    shape: tuple[object, ...] = ()
    for sequence, (step, layers, ids) in enumerate(parts):
        shape = shape or (layers, ids.shape[2])
        if (layers, ids.shape[2]) != shape:
            raise DataError(
                f"{path}, step {step}: layers and choices of a token are {(layers, ids.shape[2])}, but {shape} before; "
                "give the files of one model"
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < num_experts:
            raise DataError(
                f"{path}, step {step}: ids from {ids.min()} to {ids.max()}, but --experts {num_experts} allows 0 to "
                f"{num_experts - 1}; give the number of experts of the model"
            )
        sorted_TLK = np.sort(ids, axis=2)
        if (twice_TL := (sorted_TLK[:, :, 1:] == sorted_TLK[:, :, :-1]).any(2)).any():
            token, layer = (int(each[0]) for each in twice_TL.nonzero())
            raise DataError(
                f"{path}, step {step}: token {token} has an expert twice in layer {layers[layer]} "
                f"({ids[token, layer].tolist()}), but a router chooses k different experts; restore the file"
            )
        tokens = np.zeros(len(ids), TOKEN)
        tokens["sequence"], tokens["position"], tokens["token"] = sequence, np.arange(len(ids)), NO_ID
        found[step].append((tokens, ids.astype(np.int16)))
    if not shape:
        raise DataError(f"{path}: no routed token; give another file")
    layers, choices = shape
    assert isinstance(layers, tuple)
    assert isinstance(choices, int)
    group = routed_group(num_experts, choices)
    manifest = Manifest(1, 0, 1, layers, choices, False, (group,), (0,) * num_experts, ("tokens",), split="recorded")
    joined = {step: [np.concatenate(arrays) for arrays in zip(*each, strict=True)] for step, each in found.items()}
    return ForeignTrace({step: TracedStep(tokens, ids, None, manifest) for step, (tokens, ids) in joined.items()})


def _megatron(files: Sequence[Path]) -> Parts:
    """Reads the router trace of Megatron-Core (`--moe-routing-trace-path`). It has a JSON line for each step, block and
    layer. If a step has several lines for one layer, each is a micro-batch. Leaves out blocks of multi-token prediction."""
    for file in files:
        lines: dict[int, dict[int, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        width = None
        with open_file(file) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(_MOST_LINE), b""), 1):
                try:
                    record = parse_json(line)
                    if record["block"] == "decoder":
                        step, layer, tokens, top_k = (record[key] for key in ("step", "layer", "num_tokens", "topk"))
                        width = width or top_k
                        if top_k != width or any(
                            type(each) is not int or not 0 <= each < 1 << 53 for each in (step, layer, tokens)
                        ):
                            raise ValueError("step, layer, num_tokens and topk must be whole numbers, and topk the same")
                        lines[step][layer].append(np.array(record["top_indices"], np.int64).reshape(tokens, top_k))
                except (ValueError, KeyError, TypeError, OverflowError) as error:
                    raise DataError(
                        f"{file}, line {number}: not a record of Megatron-Core's router trace ({error!r:.100}); cut the "
                        "file before this line, or restore it"
                    ) from error
        for step, by_layer in sorted(lines.items()):
            yield _step(file, step, {layer: np.concatenate(parts) for layer, parts in by_layer.items()})


def _arrays(files: Sequence[Path]) -> Parts:
    """Reads arrays `routed_experts` [tokens, layers, k] of vLLM and SGLang. Each sequence is a file saved by numpy.

    The arrays have all layers of the model. A layer without experts, whose ids are all 0, is left out.
    """
    for file in files:
        try:
            ids = load_array(file, most_bytes=_MOST_BYTES)
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: not an array saved by numpy ({error!s:.100}); restore the file") from error
        if ids.ndim != 3 or ids.dtype.kind not in "iu" or not ids.size:
            raise DataError(
                f"{file}: {ids.dtype} of shape {ids.shape}, but routed_experts are whole numbers [tokens, layers, k], at "
                "least one of each; reshape the array"
            )
        moe_L = np.flatnonzero(ids.any((0, 2))) if ids.shape[2] > 1 else np.arange(ids.shape[1])
        if not len(moe_L):
            raise DataError(f"{file}: all ids are 0, as if the server recorded no routing; record it again")
        yield 1, tuple(moe_L.tolist()), ids[:, moe_L]


def _flame(files: Sequence[Path]) -> Parts:
    """Reads FLAME-MoE-Traces. They have a folder for each step, in which each layer is a parquet file with one row of
    `indices` for each token. Only the first FLAME_TOKENS rows of a file are read, because published files have 52 million
    rows."""
    by_step: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    for file in files:
        try:
            ids = TimedCalls(_flame_ids, seconds=10)(file)
            if ids.ndim != 2 or ids.dtype.kind != "i":
                raise ValueError(f"indices are {ids.dtype} of shape {ids.shape}")
            by_step[int(file.parent.name.removeprefix("iter_"))][int(file.stem.removeprefix("layer_"))] = ids
        except (ValueError, KeyError, NotImplementedError, StopIteration, *_LIMITS) as error:  # bases of pyarrow's errors
            raise DataError(
                f"{file}: not iter_<step>/layer_<number>.parquet with lists of k whole numbers in the column `indices` "
                f"({error!r:.100}); restore the file"
            ) from error
        except ImportError as error:
            raise ConfigError(f"{file}: reading parquet needs pyarrow; install moe_dist[hf]") from error
    for step, by_layer in by_step.items():
        yield _step(files[0].parent.parent, step, by_layer)


def _flame_ids(file: Path) -> np.ndarray:
    from pyarrow import parquet  # imported late, because only the extra `hf` installs pyarrow

    with open_file(file) as stream:
        batch = next(parquet.ParquetFile(stream).iter_batches(FLAME_TOKENS, columns=["indices"], use_threads=False))
    if batch.nbytes > _MOST_FLAME:
        raise ValueError(f"{batch.num_rows:,} tokens have {batch.nbytes:,} bytes; at most {_MOST_FLAME:,} are possible")
    return np.array(batch["indices"].to_pylist())


def _step(path: Path, step: int, by_layer: Mapping[int, np.ndarray]) -> tuple[int, tuple[int, ...], np.ndarray]:
    """Stacks the ids [T, K] of all layers of a step to [T, L, K]."""
    layers = tuple(sorted(by_layer))
    shapes = {layer: by_layer[layer].shape for layer in layers}
    if len(set(shapes.values())) > 1:
        raise DataError(
            f"{path}, step {step}: (tokens, choices)={shapes} by layer, but each token passes each layer; leave out "
            "this step and the later ones"
        )
    return step, layers, np.stack([by_layer[layer] for layer in layers], axis=1)


# Pattern of file names -> reader of the files with such names.
READERS: dict[str, Callable[[Sequence[Path]], Parts]] = {
    "router_trace_rank*.jsonl": _megatron,
    "*.npy": _arrays,
    "actives/iter_*/layer_*.parquet": _flame,
}
