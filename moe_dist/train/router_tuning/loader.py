"""Makes batches of prompts with answers, for router tuning and for multiple-choice questions. A sequence is one prompt and
its answer; only the answer's tokens are labels.

As in `moe_dist.data.loader`, the order of training samples depends only on seed and position, not on the ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from moe_dist.comm.collectives import queue_copy
from moe_dist.data.batch import IGNORED, Batch, BatchMaker, Segment
from moe_dist.data.order import ShuffledEpochs, micro_batches
from moe_dist.errors import DataError
from moe_dist.formats.manifest import Manifest
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.router_tuning.samples import Samples, TuningSample

_BATCH_LOGITS = 1 << 26  # largest number of logits per batch; logits and losses then take 256 MiB each in fp32


def batches_by_length(lengths: Sequence[int], *, tokens: int, vocab_size: int, mesh: Mesh | None) -> list[list[int]]:
    """Divides sequences into batches of similar length. Returns the indices of the sequences of each batch of this rank.

    Every rank gets the same number of batches, because each rank's experts take part in all ranks' forward passes. A rank's
    last batch may be empty.

    Args:
        lengths: Number of tokens of each sequence. All ranks must pass the same lengths.
        tokens: Largest number of tokens per batch, including padding. A large `vocab_size` lowers this number.
    """
    rank, world_size = (0, 1) if mesh is None else (mesh.rank, mesh.world_size)
    most = max(1, min(tokens, _BATCH_LOGITS // vocab_size))
    batches: list[list[int]] = []
    room = 0
    # The longest sequences come first: if memory does not suffice, the first batch already fails.
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if room <= 0:
            batches.append([])
            room = max(1, most // lengths[index])
        batches[-1].append(index)
        room -= 1
    batches += [[]] * (-len(batches) % world_size)  # `SampleMaker` fills an empty batch with one sequence of padding
    return batches[rank::world_size]


@dataclass(frozen=True)
class SampleBatch(Batch):
    """A micro-batch with one sample per sequence. The result of `to` is a `Batch` without `numbers` and `probe_tokens_B`.

    Attributes:
        numbers: Indices of the samples in `Samples`.
        probe_tokens_B: int64, index of the last token of each sample's prompt among the B x S tokens. The logits at this
            token predict the first token of the answer, and the token's routing is called the sample's routing.
    """

    numbers: tuple[int, ...]
    probe_tokens_B: torch.Tensor


@dataclass(frozen=True)
class ChoiceBatch(SampleBatch):
    """A micro-batch for the cross entropy of each row's label among the row's choices. The result of `to` has the choices,
    too. If a row of `choice_BK` (`model.objective.Choices`) has only -1, this row has no label."""

    choice_BK: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        choice_BK = queue_copy(self.choice_BK, torch.device(device))
        return replace(self, **vars(super().to(device)), choice_BK=choice_BK)

    def choices(self) -> torch.Tensor:
        return self.choice_BK


class SampleMaker:
    """Makes batches of samples, padded to the longest sample. `manifest` tells the modality of each token id."""

    def __init__(self, manifest: Manifest) -> None:
        self._pad_id, self._modalities = manifest.pad_id, tuple(manifest.modalities.values())
        self._vocab_size = max((end for ranges in self._modalities for _, end in ranges), default=0)
        self.modality_names = tuple(manifest.modalities)

    def make(self, samples: Sequence[TuningSample], numbers: Sequence[int] = ()) -> SampleBatch:
        """Makes a batch with one sequence per sample. Without samples, the batch has one sequence of padding. Raises
        DataError if a token id is outside the vocabulary."""
        rows = []
        for each in samples:
            tokens = np.concatenate([each.prompt, each.answer])
            in_prompt = np.arange(len(tokens)) < len(each.prompt)
            # The last token of an answer is only a label, not an input.
            rows.append([Segment(tokens, np.zeros(len(tokens), bool), len(tokens) - 1, prompt=in_prompt)])
        width = max((segment.length for (segment,) in rows), default=1)
        maker = BatchMaker(seq_len=width, pad_id=self._pad_id, modalities=self._modalities)
        batch = maker.make(rows or [[]])
        last_B = torch.tensor([len(each.prompt) - 1 for each in samples], dtype=torch.int64)
        plain = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        return SampleBatch(**plain, numbers=tuple(numbers), probe_tokens_B=torch.arange(len(samples)) * width + last_B)


class ChoiceMaker(SampleMaker):
    """Makes batches for the cross entropy over choices. Each row is a prompt whose only label is the first token of the
    answer. A sample without choices has no label."""

    def make(self, samples: Sequence[TuningSample], numbers: Sequence[int] = ()) -> SampleBatch:
        """Does the same as `SampleMaker.make`. The arrays of choices must be equally long for all samples. Raises DataError
        if a token id is outside the vocabulary."""
        batch = super().make([replace(each, answer=each.answer[:1]) for each in samples], numbers)
        rows = [each.choices for each in samples] or [np.full(1, -1)]  # without samples: one row of padding
        choice_BK = torch.from_numpy(np.stack(rows).astype(np.int64))
        if int(choice_BK.max()) >= self._vocab_size:
            raise DataError(
                f"token id {int(choice_BK.max())} of a choice is outside the manifest's vocab_size={self._vocab_size}; the "
                "samples belong to other data: prepare them again"
            )
        known_B1 = choice_BK[:, :1] >= 0
        labels = {
            "labels_BS": batch.labels_BS.where(known_B1, IGNORED),
            "label_modality_BS": batch.label_modality_BS.where(known_B1, 0),
        }
        return ChoiceBatch(**{**vars(batch), **labels}, choice_BK=choice_BK)


MAKERS: Mapping[str, type[SampleMaker]] = {"tokens": SampleMaker, "choices": ChoiceMaker}  # by `router_tuning.objective`


class SampleLoader:
    """Makes the training batches of one rank. `batches` and `epochs` work as in `moe_dist.data.loader.TrainLoader`.

    Args:
        samples: The samples to train on. Each epoch contains every sample once, in a new order.
        global_batch: Number of samples per step over all ranks; must be a multiple of world_size * micro_batch.
        micro_batch: Number of samples in each micro-batch of a rank.
    """

    def __init__(
        self,
        samples: Samples,
        maker: SampleMaker,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._samples, self._maker = samples, maker
        self._share = {"global_batch": global_batch, "micro_batch": micro_batch, "rank": rank, "world_size": world_size}
        self._epochs = ShuffledEpochs((seed,), len(samples))

    def batches(self, position: int) -> list[Batch]:
        """Returns this rank's micro-batches of the step that starts at sample `position` of the stream of all ranks."""
        made: list[Batch] = []
        for each in self.numbers(position):
            numbers = [self.number(at) for at in each]
            made.append(self._maker.make([self._samples.sample(number) for number in numbers], numbers))
        return made

    def numbers(self, position: int) -> Sequence[Sequence[int]]:
        """Returns, for each micro-batch of `batches(position)`, its samples' positions in the stream."""
        return micro_batches(position, **self._share)

    def number(self, position: int) -> int:
        """Returns the index in `Samples` of the sample at position `position` of the stream."""
        return self._epochs.at(position)

    def epochs(self, position: int) -> dict[str, float]:
        """Maps each modality to the number of epochs up to a position. This number is the same for all modalities."""
        return dict.fromkeys(self._maker.modality_names, position / len(self._samples))
